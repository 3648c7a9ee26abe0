"""Attention of the drafter's training blocks: the definition, in jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIDDEN = -1e30  # a finite score: a row without any visible key stays finite


def context_mask(
    anchors: Int[Array, "B A"], starts: Int[Array, "B A"], rows: int, length: int, window: int | None
) -> Bool[Array, "B A #W T"]:
    """Context position t is visible from the document's start to strictly before the anchor, inside the row's window.

    The anchor's own position is part of the block, never of the context: its features already know the token after it.
    """
    t = jnp.arange(length)
    visible = (t >= starts[..., None, None]) & (t < anchors[..., None, None])
    if window is not None:
        positions = anchors[..., None] + jnp.arange(rows)
        visible = visible & (t > positions[..., None] - window)
    return visible


def block_mask(rows: int, causal: bool, window: int | None) -> Bool[Array, "W W"]:
    """Row j of the block is visible to row i: all of them, or those not after i, and inside the window."""
    distance = jnp.arange(rows)[:, None] - jnp.arange(rows)
    visible = distance >= 0 if causal else jnp.ones_like(distance, bool)
    return visible if window is None else visible & (distance < window)


def anchored_attention(
    q: Float[Array, "B A W N H"],
    ctx_k: Float[Array, "B T K H"],
    ctx_v: Float[Array, "B T K H"],
    blk_k: Float[Array, "B A W K H"],
    blk_v: Float[Array, "B A W K H"],
    anchors: Int[Array, "B A"],
    starts: Int[Array, "B A"],
    *,
    causal: bool,
    window: int | None = None,
    scale: float,
) -> Float[Array, "B A W N H"]:
    """Softmax in fp32 over the context strictly before each anchor and the block's own rows; no block sees another.

    Row w of block a stands at position `anchors[b, a] + w`; a window counts the query itself. Scores exist for one
    sequence at a time, and are made again for the gradients.
    """
    own_seen = block_mask(q.shape[2], causal, window)

    def of_sequence(given: tuple[Array, ...]) -> Array:
        q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts = (x[None] for x in given)
        seen = context_mask(anchors, starts, q.shape[2], ctx_k.shape[1], window)
        return masked_attention(q, ctx_k, ctx_v, blk_k, blk_v, seen, own_seen, scale)[0]

    return jax.lax.map(jax.checkpoint(of_sequence), (q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts))


def masked_attention(
    q: Float[Array, "B A W N H"],
    ctx_k: Float[Array, "B T K H"],
    ctx_v: Float[Array, "B T K H"],
    blk_k: Float[Array, "B A W K H"],
    blk_v: Float[Array, "B A W K H"],
    context_seen: Bool[Array, "B A #W T"],
    own_seen: Bool[Array, "W W"],
    scale: float,
) -> Float[Array, "B A W N H"]:
    """As `anchored_attention`, for any masks."""
    B, A, W, N, H = q.shape
    K = blk_k.shape[3]
    grouped = q.reshape(B, A, W, K, N // K, H)
    context = jnp.einsum("bawkgh,btkh->bkgawt", grouped, ctx_k, preferred_element_type=jnp.float32)
    own = jnp.einsum("bawkgh,bavkh->bkgawv", grouped, blk_k, preferred_element_type=jnp.float32)
    context = jnp.where(context_seen[:, None, None], context * scale, HIDDEN)
    own = jnp.where(own_seen, own * scale, HIDDEN)
    most = jnp.maximum(jnp.max(context, -1, keepdims=True, initial=HIDDEN), jnp.max(own, -1, keepdims=True))
    context, own = (jnp.exp(x - jax.lax.stop_gradient(most)) for x in (context, own))
    total = jnp.sum(context, -1) + jnp.sum(own, -1)
    from_context = jnp.einsum("bkgawt,btkh->bawkgh", context.astype(q.dtype), ctx_v, preferred_element_type=jnp.float32)
    from_own = jnp.einsum("bkgawv,bavkh->bawkgh", own.astype(q.dtype), blk_v, preferred_element_type=jnp.float32)
    out = (from_context + from_own) / jnp.moveaxis(total, (1, 2), (3, 4))[..., None]
    return out.reshape(q.shape).astype(q.dtype)
