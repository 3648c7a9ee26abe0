"""Attention of a block of rows against a cache and against itself: the definition, in jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIDDEN = -1e30  # a finite score: a row without any visible key stays finite


def context_mask(lengths: Int[Array, "B"], rows: int, capacity: int, window: int | None) -> Bool[Array, "B W S"]:
    """Cached position s is visible when it is committed and inside the row's window (which counts the row itself)."""
    s = jnp.arange(capacity)
    visible = jnp.broadcast_to(s < lengths[:, None, None], (lengths.shape[0], rows, capacity))
    if window is not None:
        positions = lengths[:, None] + jnp.arange(rows)
        visible &= s > positions[:, :, None] - window
    return visible


def block_mask(rows: int, causal: bool, window: int | None) -> Bool[Array, "W W"]:
    """Row j of the block is visible to row i: all of them, or those not after i, and inside the window."""
    distance = jnp.arange(rows)[:, None] - jnp.arange(rows)
    visible = distance >= 0 if causal else jnp.ones_like(distance, bool)
    return visible if window is None else visible & (distance < window)


def block_attention(
    q: Float[Array, "B W N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    block_keys: Float[Array, "B W K H"],
    block_values: Float[Array, "B W K H"],
    lengths: Int[Array, "B"],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B W N H"]:
    """Softmax attention over `lengths[b]` cached rows and the block's own rows, in fp32, nothing written."""
    B, W, N, H = q.shape
    K, S = keys.shape[1], keys.shape[2]
    G = N // K
    grouped = q.reshape(B, W, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * W, H)
    own_k, own_v = block_keys.transpose(0, 2, 1, 3), block_values.transpose(0, 2, 1, 3)

    def scores(k: Array, mask: Array) -> Array:
        # Keys on the left: with them on the right the CPU packs the whole cache anew (4x slower at 512 positions).
        s = jnp.einsum("bksh,bkrh->bksr", k, grouped, preferred_element_type=jnp.float32).swapaxes(2, 3) * scale
        return jnp.where(mask[:, None, None], s.reshape(B, K, G, W, -1), HIDDEN)

    parts = [scores(own_k, block_mask(W, causal, window)[None])]
    if S:
        parts.insert(0, scores(keys, context_mask(lengths, W, S, window)))
    top = jnp.max(jnp.stack([p.max(-1) for p in parts]), 0)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, K, G, 1)
    top = jax.lax.stop_gradient(top if sink is None else jnp.maximum(top, sink))
    weights = [jnp.exp(p - top[..., None]) for p in parts]
    total = jnp.stack([w.sum(-1) for w in weights]).sum(0)
    total = total if sink is None else total + jnp.exp(sink - top)

    def weighted(w: Array, v: Array) -> Array:
        w = w.reshape(B, K, G * W, -1).astype(v.dtype)
        return jnp.einsum("bkrs,bksh->bkrh", w, v, preferred_element_type=jnp.float32)

    out = weighted(weights[-1], own_v)
    if S:
        out = out + weighted(weights[0], values)
    out = out.reshape(B, K, G, W, H) / total[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, W, N, H).astype(q.dtype)
