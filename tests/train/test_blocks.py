"""The training forward is the serving forward: one block at a time, after a context of committed positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash_jax.cache import DrafterCache
from dflash_jax.config import DrafterConfig, RopeConfig
from dflash_jax.models.drafter import Drafter
from pallas_kernels.anchored_attention import reference
from tests import weights
from train.blocks import block_hidden

DIM, ROWS, LENGTH = 16, 4, 20
ANCHORS = np.array([[3, 4, 11, 15], [1, 7, 8, 16]])


def drafter(kind: str, causal: bool, **extra) -> Drafter:
    config = DrafterConfig(
        vocab_size=32, hidden_size=DIM, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
        layer_types=(kind,) * 2, causal=(causal,) * 2, sliding_window=6 if kind == "sliding_attention" else None,
        rope=RopeConfig(theta=1e4, dim=8), block_size=ROWS, mask_token_id=1, tap_ids=(0, 1), num_target_layers=4,
        **extra,
    )  # fmt: skip
    return weights.noisy(lambda: Drafter(config, rngs=nnx.Rngs(0)))


def inputs() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    taps = jax.random.normal(keys[0], (2, LENGTH, 2 * DIM))
    return jax.random.normal(keys[1], (2, ANCHORS.shape[1], ROWS, DIM)), taps


KINDS = [
    ("full_attention", False, {}),
    ("sliding_attention", True, {}),
    ("full_attention", True, {"attention_bias": True, "input_embedding_scale": 2.0}),
    ("full_attention", False, {"conv_kernel_size": 2, "conv_group_size": 4}),
]


@pytest.mark.parametrize(("kind", "causal", "extra"), KINDS)
def test_training_blocks_equal_serving_blocks(kind, causal, extra):
    model, (embedded, taps) = drafter(kind, causal, **extra), inputs()

    @jax.jit
    def alone(embedded: jax.Array, lengths: jax.Array) -> jax.Array:
        cache = DrafterCache.empty(model.config, 2, LENGTH, jnp.float32)
        cache = cache.commit(model.context(taps, jnp.zeros(2, jnp.int32)), jnp.zeros(2, jnp.int32), lengths)
        return model(embedded, cache, lengths)

    together = jax.jit(lambda: block_hidden(model, embedded, taps, jnp.asarray(ANCHORS)))()
    for a in range(ANCHORS.shape[1]):
        one = alone(embedded[:, a], jnp.asarray(ANCHORS[:, a]))
        np.testing.assert_allclose(together[:, a], one, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("kind", "causal", "extra"), KINDS[:2])
def test_context_leak(kind, causal, extra):
    """No block sees context at or after its anchor: features there know the tokens that it has to predict."""
    check_reach(kind, causal, extra)


def test_a_visible_anchor_position_is_caught(monkeypatch):
    mask = reference.context_mask
    monkeypatch.setattr(reference, "context_mask", lambda anchors, *rest: mask(anchors + 1, *rest))
    jax.clear_caches()  # of what was traced without the fault
    with pytest.raises(AssertionError):
        check_reach("full_attention", False, {})
    jax.clear_caches()  # of what was traced with it


def check_reach(kind, causal, extra):
    model, (embedded, taps) = drafter(kind, causal, **extra), inputs()

    @jax.jit
    @jax.grad
    def influence(taps: jax.Array, b: int, a: int) -> jax.Array:
        return jnp.sum(block_hidden(model, embedded, taps, jnp.asarray(ANCHORS))[b, a] ** 2)

    for b, a in np.ndindex(ANCHORS.shape):
        seen = np.abs(np.asarray(influence(taps, b, a))).sum(-1)
        first = 0 if kind == "full_attention" else max(0, ANCHORS[b, a] - 6 + 1)
        assert np.all(seen[b, first : ANCHORS[b, a]] > 0)
        assert not seen[b, ANCHORS[b, a] :].any()
        assert not seen[b, :first].any()
        assert not seen[1 - b].any()


def test_no_block_sees_another():
    model, (embedded, taps) = drafter("full_attention", False), inputs()

    @jax.jit
    @jax.grad
    def influence(embedded: jax.Array) -> jax.Array:
        return jnp.sum(block_hidden(model, embedded, taps, jnp.asarray(ANCHORS))[0, 2] ** 2)

    seen = np.abs(np.asarray(influence(embedded))).sum((-1, -2)) > 0
    assert seen[0, 2] and seen.sum() == 1
