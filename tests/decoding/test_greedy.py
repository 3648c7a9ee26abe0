"""Greedy speculative output is plain greedy output, token for token, and leaves the state of sequential decoding."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.cache import Recurrence, TargetCache
from dflash_jax.decoding.generate import generate
from dflash_jax.decoding.run import Run
from dflash_jax.models.target import Target
from pallas_kernels.gated_delta import fold
from tests.decoding import pairs

pytestmark = pytest.mark.usefixtures("small_chunks")
# Below, at and above a block (4), a chunk (8) and two chunks.
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 21]
NEW = 36


@cache
def plain(family):
    return generate(pairs.pair(family), pairs.prompts(LENGTHS), max_new_tokens=NEW, draft=False)


def check(outputs, expected):
    for length, got, want in zip(LENGTHS, outputs, expected, strict=True):
        assert got.tokens == want.tokens, length
        assert sum(got.acceptance_lengths) == NEW - 1


@pytest.mark.parametrize("family", pairs.TARGETS)
def test_plain_output_is_the_argmax_of_the_logits(family):
    """Of whole sequences, without a cache and without chunks."""
    prompts, outputs = pairs.prompts(LENGTHS), plain(family)
    rows = np.zeros((len(prompts), max(LENGTHS) + NEW), int)
    for row, prompt, output in zip(rows, prompts, outputs, strict=True):
        row[: len(prompt) + NEW] = [*prompt, *output.tokens]
    best = np.argmax(pairs.pair(family).logits(rows), -1)
    for row, length, output in zip(best, LENGTHS, outputs, strict=True):
        assert row[length - 1 : length - 1 + NEW].tolist() == output.tokens, length


@pytest.mark.parametrize("drafter", ["dflash", "dflash2"])
@pytest.mark.parametrize("family", pairs.TARGETS)
def test_speculative_output_is_plain_output(family, drafter):
    expected = plain(family)
    assert (
        len({tuple(g.tokens[i : i + 3]) for g in expected for i in range(NEW - 2)}) > 20
    )  # no tokens for ever the same
    outputs = generate(pairs.pair(family, drafter), pairs.prompts(LENGTHS), max_new_tokens=NEW)
    check(outputs, expected)
    lengths = {n for g in outputs for n in g.acceptance_lengths}
    assert {1, 2, 3} <= lengths <= set(range(1, pairs.BLOCK + 1))


@pytest.mark.parametrize("width", [1, 2, 3])
def test_any_width_gives_the_same(width):
    outputs = generate(pairs.pair("qwen3_5_moe"), pairs.prompts(LENGTHS), max_new_tokens=NEW, width=width)
    check(outputs, plain("qwen3_5_moe"))
    assert max(n for g in outputs for n in g.acceptance_lengths) == width


@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss"])
def test_alone_gives_the_same(family):
    for i in (0, 7, 11):
        (got,) = generate(pairs.pair(family), [pairs.prompts(LENGTHS)[i]], max_new_tokens=NEW)
        assert got.tokens == plain(family)[i].tokens


@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss"])
def test_state_is_that_of_sequential_decoding(family, states):
    """Keys, values, recurrent state with its pending rows folded in, and convolution tails, after five rounds."""
    pair = pairs.pair(family)
    steps = Run(pair, pairs.prompts(LENGTHS), NEW, {}, (), True, None).dispatches(iter([5]))
    next(steps), next(steps)
    (state,) = states
    lengths = np.asarray(state.cache.lengths)
    assert np.ptp(lengths - LENGTHS) > 1  # rounds of different lengths
    np.testing.assert_array_equal(lengths, np.asarray(state.known) - 1)
    tokens, step = jnp.asarray(state.tokens), jax.jit(Target.prefill)
    cache = TargetCache.empty(pair.target.config, len(LENGTHS), tokens.shape[1], 1, jnp.float32)
    for t in range(lengths.max()):
        _, cache = step(pair.target, tokens[:, t : t + 1], jnp.asarray(lengths > t, jnp.int32), cache)
    for got, want in zip(state.cache.layers, cache.layers, strict=True):
        if isinstance(want, Recurrence):
            assert np.std(want.state) > 0.1
            np.testing.assert_allclose(fold(got.state, got.pending), fold(want.state, want.pending), atol=1e-4)
            np.testing.assert_allclose(got.conv, want.conv, atol=1e-4)
        else:
            for b, committed in enumerate(lengths):
                for name in ("keys", "values"):
                    rows, right = (getattr(layer, name)[b, :, :committed] for layer in (got, want))
                    np.testing.assert_allclose(rows, right, atol=1e-4)


def test_requests_past_the_drafters_positions_go_on_plainly():
    last = 20
    outputs = generate(pairs.pair("qwen3", drafter_positions=last), pairs.prompts(LENGTHS), max_new_tokens=NEW)
    check(outputs, plain("qwen3"))
    inside, outside = [], []
    for length, output in zip(LENGTHS, outputs, strict=True):
        starts = length + np.cumsum([0, *output.acceptance_lengths[:-1]])
        for start, n in zip(starts, output.acceptance_lengths, strict=True):
            (inside if start + pairs.BLOCK <= last else outside).append(n)
    assert max(inside) > 1 and set(outside) == {1}
