"""Which prompts a pass takes, and in what shape."""

from types import SimpleNamespace
from typing import Any

import pytest

from serve.pages import Pages
from serve.requests import Running
from serve.scheduler import Scheduler

SHAPES = ((1, 4), (3, 4), (1, 16))


def running(order: int, left: int) -> Running:
    """A request in a slot, with so many tokens left to prefill."""
    unused: Any = None
    output: Any = SimpleNamespace(tokens=[])
    r = Running(unused, order, [0] * 50, 60, unused, unused, output, unused, slot=order)
    r.goal, r.prefilled = 50, 50 - left
    return r


@pytest.mark.parametrize(
    "left, shape, taken",
    [
        ([3], (1, 4), [3]),
        ([3, 2, 4], (3, 4), [3, 2, 4]),
        ([3, 9], (1, 4), [3]),  # the other one needs a wide pass in any case
        ([3, 18], (3, 4), [3, 4]),  # one wide pass in place of two
        ([3, 9, 1], (3, 4), [3, 1]),
        ([9, 2], (1, 16), [9]),
        ([40], (1, 16), [16]),
        ([1, 2, 3, 4], (3, 4), [1, 2, 3]),
    ],
)
def test_a_pass_is_as_wide_as_the_first_prompt_needs_and_takes_those_that_save_one(left, shape, taken):
    scheduler = Scheduler(len(left), 4, 4, Pages(99), None)
    scheduler.slots = [running(i, n) for i, n in enumerate(left)]
    found = scheduler.chunks(SHAPES)
    assert found is not None
    assert (found[0], [chunk.count for chunk in found[1]]) == (shape, taken)
