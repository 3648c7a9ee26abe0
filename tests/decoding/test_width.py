"""Plain rounds amid drafted ones: when they are taken, and that nobody sees it in the tokens."""

import dataclasses

import numpy as np
import pytest

from dflash_jax.decoding.generate import generate
from dflash_jax.decoding.width import LONGEST, Controller
from tests.decoding import pairs


def follow(gains, break_even):
    """Drafted (True) and plain rounds that a controller orders, for what its drafted rounds give."""
    controller, order = Controller.start(np.float32(break_even)), []
    for gain in gains:
        order.append(True)
        controller = controller.after_drafted(np.float32(gain))
        while int(controller.wait) > 0:
            order.append(False)
            controller = controller.after_plain()
    return order


def test_drafts_that_pay_are_never_left_out():
    assert follow([4.0] * 30, 2.5) == [True] * 30


def test_waits_longer_and_longer_while_drafts_fail():
    order = follow([1.0] * 20, 2.5)
    waits = [len(run) for run in "".join("d" if drafted else "p" for drafted in order).split("d")[1:]]
    first = next(i for i, wait in enumerate(waits) if wait)
    assert waits[first:] == [min(2**i, LONGEST) for i in range(len(waits) - first)]
    assert follow([1.0] * 20 + [9.0] * 10, 2.5)[-9:] == [True] * 9


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "sampled"])
def test_output_is_plain_output(family, settings):
    """State, caches and flags stay right across both kinds of rounds, for hybrid and for attention targets."""
    pair = pairs.pair(family)
    prompt = [4, 5, 1, 2, 3, 0, 2, 1, 1, 3, 4]
    (plain,) = generate(pair, prompt, max_new_tokens=40, draft=False, **settings)
    (mixed,) = generate(dataclasses.replace(pair, break_even=1.8), prompt, max_new_tokens=40, **settings)
    assert mixed.tokens == plain.tokens
    (always,) = generate(pair, prompt, max_new_tokens=40, **settings)
    assert 0 < len(mixed.acceptance_lengths) < len(always.acceptance_lengths)
