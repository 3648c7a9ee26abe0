"""The target against transformers: logits and every layer's tap, in one piece and through the cache."""

from functools import partial

import numpy as np
import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp

from dflash_jax.cache import TargetCache
from dflash_jax.checkpoints.target import load_target
from dflash_jax.models.target import Target
from tests import torch_models

pytestmark = pytest.mark.torch
TOLERANCE = 1e-4
BATCH, LENGTH = 2, 21


@pytest.fixture(scope="module", params=list(torch_models.CASES))
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = torch_models.save(request.param, folder)
    tokens = np.random.default_rng(0).integers(0, torch_models.VOCAB, (BATCH, LENGTH))
    config, target = load_target(folder)
    return config, target, tokens, *torch_models.outputs(reference, tokens)


def check(config, target, hidden, taps, logits, layers):
    assert logits.std() > 0.2  # far above the tolerance
    np.testing.assert_allclose(target.head(hidden), logits, atol=TOLERANCE)
    np.testing.assert_allclose(hidden, layers[-1], atol=TOLERANCE)
    side_by_side = np.concatenate(layers[:-1], -1)  # the last entry of transformers is normed, a tap never is
    np.testing.assert_allclose(taps[..., : side_by_side.shape[-1]], side_by_side, atol=TOLERANCE)
    normed = target.norm(taps[..., side_by_side.shape[-1] :])
    np.testing.assert_allclose(normed, layers[-1], atol=TOLERANCE)


def test_sequence_gives_the_logits_and_taps_of_transformers(pair):
    config, target, tokens, logits, layers = pair
    sequence = jax.jit(partial(Target.sequence, tap_ids=range(config.num_layers)))
    out = sequence(target, jnp.asarray(tokens))
    check(config, target, out.hidden, out.taps, logits, layers)


def test_cached_chunks_and_blocks_give_the_same(pair):
    """A ragged prefill in two chunks, then blocks of which only some rows are kept, as in the rounds of decoding."""
    config, target, tokens, logits, layers = pair
    rows, tap_ids = 4, range(config.num_layers)
    cache = TargetCache.empty(config, BATCH, 32, rows, jnp.float32)
    hidden, taps, done = [[] for _ in tokens], [[] for _ in tokens], np.zeros(BATCH, int)

    def keep(out, count):
        for b, n in enumerate(count):
            hidden[b].append(out.hidden[b, :n])
            taps[b].append(out.taps[b, :n])
            done[b] += n

    def chunk(width):
        padded = np.pad(tokens, ((0, 0), (0, width)), constant_values=1)
        return jnp.asarray([padded[b, n : n + width] for b, n in enumerate(done)])

    prefill = jax.jit(partial(Target.prefill, tap_ids=tap_ids))
    for count in ([6, 3], [2, 5]):
        out, cache = prefill(target, chunk(6), jnp.asarray(count), cache)
        keep(out, count)
    verify = jax.jit(partial(Target.verify, tap_ids=tap_ids))
    for kept in ([1, 4], [4, 1], [3, 3], [4, 4], [1, 1]):
        out = verify(target, chunk(rows), cache)
        cache = cache.commit(out.layers, jnp.asarray(kept))
        keep(out, kept)
    assert np.array_equal(done, [LENGTH, LENGTH]) and np.array_equal(cache.lengths, done)
    whole = [jnp.stack([jnp.concatenate(parts) for parts in rows]) for rows in (hidden, taps)]
    check(config, target, *whole, logits, layers)
