"""The width follows acceptance and cost, and trials are few where they change nothing."""

import numpy as np
import pytest

from dflash_jax.decoding.width import WidthController

FLAT = {1: 1.0, 2: 1.02, 4: 1.05, 8: 1.1}  # rows are nearly free
STEEP = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}


def simulate(costs, acceptance, dispatches=400, rows=4, seed=0):
    """Tokens a second of the controller over those of plain decoding, and the widths it took."""
    rng, controller = np.random.default_rng(seed), WidthController(costs)
    tokens = seconds = 0.0
    widths = []
    for _ in range(dispatches):
        width, trial = controller.choose("load")
        rounds = 2 if trial else 8
        right = rng.random((rows * rounds, width - 1)) < acceptance
        counts = 1 + np.cumprod(right, axis=1).sum(1)
        controller.observe_counts(width, counts.reshape(rows, rounds).tolist())
        controller.observe_cost("load", width, costs[width])
        tokens, seconds = tokens + counts.sum() / rows, seconds + rounds * costs[width]
        widths.append(width)
    return tokens / seconds * costs[1], widths


@pytest.mark.parametrize(("costs", "acceptance", "best"), [(FLAT, 0.9, 8), (FLAT, 0.02, 1), (STEEP, 0.9, 1)])
def test_it_finds_the_best_width(costs, acceptance, best):
    _, widths = simulate(costs, acceptance)
    assert np.mean(np.array(widths[100:]) == best) > 0.9


def test_it_is_hardly_slower_than_plain_decoding_where_drafts_are_worth_nothing():
    gain, _ = simulate(STEEP, 0.0)
    assert gain > 0.95


def test_it_gains_where_they_are():
    gain, _ = simulate(FLAT, 0.9)
    assert gain > 4


def test_it_comes_back_when_drafts_get_better():
    controller, taken = WidthController(FLAT), []
    for step in range(1200):
        width, _ = controller.choose("load")
        controller.observe_counts(width, [[width if step > 200 else 1] * 8])
        controller.observe_cost("load", width, FLAT[width])
        taken.append(width)
    assert set(taken[100:200:1]) >= {1} and np.mean(np.array(taken[100:200]) == 1) > 0.8
    assert np.mean(np.array(taken[-100:]) == 8) > 0.9


def test_sequences_side_by_side_make_what_is_known_steadier():
    def known(sequences):
        rng, controller, seen = np.random.default_rng(0), WidthController([1, 8]), []
        for _ in range(300):
            right = rng.random((sequences, 1, 7)) < 0.7
            controller.observe_counts(8, (1 + np.cumprod(right, 2).sum(2)).tolist())
            seen.append(controller.expected(8))
        return np.std(seen[50:])

    assert known(16) < 0.4 * known(1)


def test_expected_tokens():
    controller = WidthController([1, 3])
    controller.acceptance = [0.5, 0.5]
    assert controller.expected(1) == 1
    assert controller.expected(3) == 1.75
    assert controller.expected(3, share=0.5) == 1.375
    assert controller.choose("load", share=0.0) == (1, False)
