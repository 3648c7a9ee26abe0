"""Documents packed into one row: each runs as if it were alone, in the target and in the drafter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash_jax.models.target import Target
from pallas_kernels.documents import document_starts, positions
from tests import weights
from tests.train import tiny
from tests.train.small import drafter
from train.blocks import block_hidden

LENGTHS = [[5, 17, 2, 8], [1, 3, 21, 7]]  # of the documents of two rows, with padding behind the first row's last one
SEGMENTS = np.array([np.repeat([1, 2, 3, 0], LENGTHS[0]), np.repeat([1, 2, 3, 4], LENGTHS[1])])
SPANS = [
    (b, np.flatnonzero(row == number)[[0, -1]]) for b, row in enumerate(SEGMENTS) for number in range(1, row.max() + 1)
]
TOKENS = np.random.default_rng(3).integers(0, 9, SEGMENTS.shape)  # no norm divides by nearly nothing, see the bound


def test_positions_begin_anew_with_each_document():
    for b, (first, last) in SPANS:
        assert list(np.asarray(positions(jnp.asarray(SEGMENTS)))[b, first : last + 1]) == list(range(last - first + 1))
        assert set(np.asarray(document_starts(jnp.asarray(SEGMENTS)))[b, first : last + 1].tolist()) == {first}


def model(**changes) -> Target:
    config = dataclasses.replace(tiny.TARGET.target_config(9, 8), **changes)
    return weights.noisy(lambda: Target(config, rngs=nnx.Rngs(1)))


KINDS = {
    "hybrid": {},
    "window": {"layer_types": ("sliding_attention", "full_attention", "linear_attention"), "sliding_window": 4},
    "sinks": {"layer_types": ("full_attention",) * 3, "sinks": True, "gated_attention": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_document_runs_as_if_alone(kind):
    target = model(**KINDS[kind])
    run = jax.jit(lambda tokens, segments: target.sequence(tokens, segments, tap_ids=(0, 1)))
    packed = run(jnp.asarray(TOKENS), jnp.asarray(SEGMENTS))
    alone = jax.jit(lambda tokens: target.sequence(tokens, tap_ids=(0, 1)))
    whole = alone(jnp.asarray(TOKENS))
    assert np.abs(np.asarray(whole.taps - packed.taps))[SEGMENTS > 1].max() > 1e-2  # it is not causality alone
    for b, (first, last) in SPANS:
        padded = np.zeros((1, SEGMENTS.shape[1]), int)  # one shape, one compilation; what follows is not seen
        padded[0, : last + 1 - first] = TOKENS[b, first : last + 1]
        one = alone(jnp.asarray(padded))
        for found, wanted in ((packed.taps, one.taps), (packed.hidden, one.hidden)):
            wanted = np.asarray(wanted)[0, : last + 1 - first]
            error = np.abs(np.asarray(found)[b, first : last + 1] - wanted).max()
            assert error <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("extra", [{}, {"sliding_window": 4}, {"convolution": True}])
def test_blocks_of_a_packed_document_are_those_of_the_document_alone(target, extra):
    draft = drafter(target, **extra)
    rng = np.random.default_rng(1)
    taps = rng.normal(size=(*SEGMENTS.shape, 16)).astype(np.float32)
    starts = np.array([[0, 5, 5, 5, 22], [0, 4, 4, 4, 25]])
    anchors = np.array([[3, 5, 6, 20, 23], [0, 4, 9, 24, 31]])
    embedded = rng.normal(size=(2, 5, 4, 16)).astype(np.float32)

    @jax.jit
    def packed(taps):
        given = map(jnp.asarray, (embedded, taps, anchors, starts, positions(jnp.asarray(SEGMENTS))))
        return block_hidden(draft, *given)

    alone = jax.jit(lambda embedded, taps, anchors: block_hidden(draft, embedded, taps, anchors))
    together = packed(taps)
    for b, a in np.ndindex(2, 5):
        own = np.roll(taps[b], -starts[b, a], 0)[None]
        one = alone(embedded[b : b + 1, a : a + 1], own, jnp.asarray(anchors[b : b + 1, a : a + 1] - starts[b, a]))
        np.testing.assert_allclose(together[b, a], one[0, 0], rtol=1e-5, atol=1e-5)
