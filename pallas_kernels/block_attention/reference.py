"""Attention of a block of rows against a cache and against itself: the definition, in jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIDDEN = -1e30  # a finite score: a row without any visible key stays finite


def write_rows(
    cache: Float[Array, "B K S H"],
    rows: Float[Array, "B K W H"],
    start: Int[Array, "B"],
    count: Int[Array, "B"] | None = None,
) -> Float[Array, "B K S H"]:
    """The cache with row i of sequence b at `start[b] + i`, for i < `count[b]` only where that is given.

    All W rows must have room: start + W <= S.
    """

    def place(cache: Array, rows: Array, start: Array, count: Array | None) -> Array:
        if count is not None:
            old = jax.lax.dynamic_slice_in_dim(cache, start, rows.shape[1], axis=1)
            rows = jnp.where((jnp.arange(rows.shape[1]) < count)[:, None], rows, old)
        return jax.lax.dynamic_update_slice_in_dim(cache, rows, start, axis=1)

    return jax.vmap(place)(cache, rows.astype(cache.dtype), start, count)


def visible(
    lengths: Int[Array, "B"], rows: int, capacity: int, causal: bool, window: int | None
) -> Bool[Array, "B W S"]:
    """Row i, at position `lengths[b] + i`, sees what is committed, and the block up to itself (causal) or all of it.

    A window counts the row itself, and bounds what lies before it.
    """
    s = jnp.arange(capacity)
    positions = (lengths[:, None] + jnp.arange(rows))[:, :, None]
    last = positions if causal else (lengths + rows - 1)[:, None, None]
    seen = jnp.broadcast_to(s <= last, (lengths.shape[0], rows, capacity))
    return seen if window is None else seen & (s > positions - window)


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
) -> tuple[Float[Array, "B W N H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Softmax attention over `lengths[b]` cached rows and the block's own rows, in fp32.

    Returns the output, and keys and values with the block's rows behind the committed ones. Rows past the committed
    length are never read, and the next block overwrites them; so to reject a row is not to count it. A cache of
    capacity 0 (training) takes no rows.
    """
    B, W = q.shape[:2]
    own = block_keys.swapaxes(1, 2), block_values.swapaxes(1, 2)
    if keys.shape[2]:
        keys, values = (write_rows(cache, rows, lengths) for cache, rows in zip((keys, values), own, strict=True))
        out = _attend(q, keys, values, visible(lengths, W, keys.shape[2], causal, window), scale, sinks)
    else:
        out = _attend(q, *own, visible(jnp.zeros(B, jnp.int32), W, W, causal, window), scale, sinks)
    return out, keys, values


def _attend(q: Array, keys: Array, values: Array, mask: Array, scale: float, sinks: Array | None) -> Array:
    """q [B W N H] against keys and values [B K S H], of which row w sees mask [B W S]."""
    B, W, N, H = q.shape
    K = keys.shape[1]
    G = N // K
    grouped = q.reshape(B, W, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * W, H)
    # Keys on the left: with them on the right the CPU packs the whole cache anew (4x slower at 512 positions).
    scores = jnp.einsum("bksh,bkrh->bksr", keys, grouped, preferred_element_type=jnp.float32).swapaxes(2, 3) * scale
    scores = jnp.where(mask[:, None, None], scores.reshape(B, K, G, W, -1), HIDDEN)
    top = jnp.max(scores, -1)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, K, G, 1)
    top = jax.lax.stop_gradient(top if sink is None else jnp.maximum(top, sink))
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, -1)
    total = total if sink is None else total + jnp.exp(sink - top)
    out = jnp.einsum(
        "bkrs,bksh->bkrh", weights.reshape(B, K, G * W, -1).astype(values.dtype), values,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    out = out.reshape(B, K, G, W, H) / total[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, W, N, H).astype(q.dtype)
