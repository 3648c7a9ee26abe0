"""Heads of 64 numbers in bfloat16 lie two by two in the cache, and nothing else changes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash_jax import cache as cache_module
from dflash_jax.abstract import empty_state
from dflash_jax.cache import DrafterCache, TargetCache
from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.decoding.round import decode_round
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from dflash_jax.sharding import abstract_mesh
from tests.checkpoints.folders import DRAFTERS, TARGETS, random_leaves

HEADS = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
TAPS = {"num_target_layers": 4, "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 1]}}
TARGET = TargetConfig.from_dict(TARGETS["gpt_oss"] | HEADS)
DRAFTER = DrafterConfig.from_dict(DRAFTERS["dflash"] | HEADS | TAPS)
B, CAPACITY, W = 2, 32, 4


def models():
    target = random_leaves(lambda: Target(TARGET, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    drafter = random_leaves(lambda: Drafter(DRAFTER, dtype=jnp.bfloat16, rngs=nnx.Rngs(1)))
    return jax.tree.map(lambda x: (0.2 * x).astype(x.dtype), (target, drafter))


def through_the_caches():
    """A ragged prefill, a committed block, and a block of the drafter's: what came out, and the caches."""
    target, drafter = models()
    tokens = np.random.default_rng(0).integers(0, TARGET.vocab_size, (B, 8 + W))
    count = jnp.array([8, 5])
    cache = TargetCache.empty(TARGET, B, CAPACITY, W, jnp.bfloat16)
    drafted = DrafterCache.empty(DRAFTER, B, CAPACITY, jnp.bfloat16)
    prefill = partial(Target.prefill, tap_ids=DRAFTER.tap_ids)
    out, cache = jax.jit(prefill)(target, jnp.asarray(tokens[:, :8]), count, cache)
    commit = jax.jit(lambda drafter, cache, taps, at, n: cache.commit(drafter.context(taps, at), at, n))
    drafted = commit(drafter, drafted, out.taps, jnp.zeros(B, jnp.int32), count)
    verify = partial(Target.verify, tap_ids=DRAFTER.tap_ids)
    for kept in ([3, 1], [4, 2]):
        block = jax.jit(verify)(target, jnp.asarray(tokens[:, 8:]), cache)
        drafted = commit(drafter, drafted, block.taps, cache.lengths, jnp.array(kept))
        cache = cache.commit(block.layers, jnp.array(kept))
    embedded = target.embed(jnp.asarray(tokens[:, :W]))
    hidden = jax.jit(Drafter.__call__)(drafter, embedded, drafted, cache.lengths)
    return [out.hidden[0], block.hidden, hidden], cache, drafted


def test_packed_equals_apart(monkeypatch):
    packed, cache, drafted = through_the_caches()
    assert {layer.keys.shape for layer in (*cache.layers, *drafted.layers)} == {(B, 1, CAPACITY, 128)}
    monkeypatch.setattr(cache_module, "side_by_side", lambda *_: 1)
    apart, cache_apart, drafted_apart = through_the_caches()
    for one, other in zip(packed, apart, strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert other.std() > 0.1
        np.testing.assert_allclose(one, other, atol=0.05 * other.std())
    for one, other in zip((*cache.layers, *drafted.layers), (*cache_apart.layers, *drafted_apart.layers), strict=True):
        for held, alone in ((one.keys, other.keys), (one.values, other.values)):
            held = np.asarray(held, np.float32).reshape(B, CAPACITY, 2, 64).swapaxes(1, 2)
            for b, n in enumerate(np.asarray(cache.lengths)):
                np.testing.assert_allclose(held[b, :, :n], np.asarray(alone, np.float32)[b, :, :n], atol=0.05)


@pytest.mark.parametrize(("heads", "tensor", "together"), [(2, 1, 2), (4, 2, 2), (2, 2, 1), (3, 1, 1)])
def test_a_pair_is_of_one_shard(heads, tensor, together):
    with jax.sharding.use_abstract_mesh(abstract_mesh(tensor=tensor)):
        cache = jax.eval_shape(lambda: DrafterCache.empty(replace(DRAFTER, num_kv_heads=heads), B, 8, jnp.bfloat16))
    assert cache.layers[0].keys.shape == (B, heads // together, 8, together * 64)


@pytest.mark.parametrize("packed", [True, False])
def test_a_round_on_a_tpu_runs_the_kernels(packed, monkeypatch):
    """Which take no cache whose rows have 64 numbers."""
    if not packed:
        monkeypatch.setattr(cache_module, "side_by_side", lambda *_: 1)
    graph, weights = nnx.split(nnx.eval_shape(models))
    state = jax.eval_shape(lambda: empty_state(TARGET, DRAFTER, B, CAPACITY, W))
    run = jax.jit(lambda weights, state: decode_round(*nnx.merge(graph, weights), state, None, W))
    text = jax.export.export(run, platforms=["tpu"])(weights, state).mlir_module()
    functions = [part for part in text.split("func.func private @") if 'kernel_name = "block_attention_4"' in part]
    calls = sum(text.count(f"call @{function.partition('(')[0]}(") for function in functions)  # layers share them
    assert calls == (TARGET.num_layers + DRAFTER.num_layers if packed else 0)
