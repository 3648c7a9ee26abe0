"""Which prompts a pass takes, in what turns, and in what shape."""

from types import SimpleNamespace
from typing import Any

import pytest

from serve.pages import Pages
from serve.requests import Running
from serve.scheduler import TURNS, Scheduler

SHAPES = ((1, 4), (3, 4), (1, 16))


def running(order: int, left: int) -> Running:
    """A request in a slot, with so many tokens left to prefill."""
    unused: Any = None
    output: Any = SimpleNamespace(tokens=[], prompt_top=None)
    r = Running(unused, order, [0] * 50, 60, unused, unused, output, unused, slot=order)
    r.goal, r.prefilled = 50, 50 - left
    return r


@pytest.mark.parametrize(
    "left, shape, taken",
    [
        ([3], (1, 4), [3]),
        ([3, 2, 4], (3, 4), [2, 3, 4]),
        ([3, 9], (1, 4), [3]),  # the other one needs a wide pass in any case
        ([3, 18], (3, 4), [3, 4]),  # one wide pass in place of two
        ([3, 9, 1], (3, 4), [1, 3]),
        ([9, 2], (1, 4), [2]),
        ([9], (1, 16), [9]),
        ([40], (1, 16), [16]),
        ([1, 2, 3, 4], (3, 4), [1, 2, 3]),
    ],
)
def test_a_pass_is_as_wide_as_the_first_prompt_needs_and_takes_those_that_save_one(left, shape, taken):
    scheduler = Scheduler(len(left), 4, 4, Pages(99), None)
    scheduler.slots = [running(i, n) for i, n in enumerate(left)]
    found = scheduler.chunks(SHAPES)
    assert found is not None
    assert (found.shape, [chunk.count for chunk in found.chunks]) == (shape, taken)


def orders(scheduler, passes, quick=lambda *_: True):
    """Run passes: (shape, who was in it) of each."""
    found = (scheduler.chunks(SHAPES, quick) for _ in range(passes))
    return [(one.shape, [chunk.running.order for chunk in one.chunks]) for one in found if one is not None]


def test_short_prompts_go_first_and_a_long_one_has_its_turn():
    """Whoever came later goes before it four times at most."""
    scheduler = Scheduler(1, 4, 4, Pages(99), None)
    scheduler.slots = [running(0, 47)]
    taken = []
    for order in range(1, 12):
        scheduler.slots = [r for r in scheduler.slots if r.waits_for_prefill] + [running(order, 2)]
        taken += [rows[0] for _, rows in orders(scheduler, 1)]
    assert [order > 0 for order in taken] == [True] * TURNS + [False] + [True] * TURNS + [False, True]


def test_prompts_as_long_as_each_other_come_one_after_the_other():
    scheduler = Scheduler(2, 4, 4, Pages(99), None)
    scheduler.slots = [running(0, 48), running(1, 48)]
    assert [rows for _, rows in orders(scheduler, 6)] == [[0]] * 3 + [[1]] * 3


def test_a_pass_is_no_wider_than_is_quick():
    """The narrowest is taken however long it takes; a shape of many prompts has to be quick, too."""
    scheduler = Scheduler(2, 4, 4, Pages(99), None)
    scheduler.slots = [running(0, 48)]
    slow = orders(scheduler, 3, lambda shape, before: shape[1] == 4 or before < 10)
    assert slow == [((1, 16), [0]), ((1, 4), [0]), ((1, 4), [0])]
    scheduler.slots = [running(0, 3), running(1, 3)]
    assert orders(scheduler, 1, lambda shape, before: shape == (1, 4)) == [((1, 4), [0])]
