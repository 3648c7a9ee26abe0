"""Gradients by autodiff of the reference, a few blocks at a time: what a platform without a backward kernel runs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.anchored_attention.reference import block_mask, context_mask, masked_attention


def gradients(
    q: Float[Array, "B A W N H"],
    ctx_k: Float[Array, "B T K H"],
    ctx_v: Float[Array, "B T K H"],
    blk_k: Float[Array, "B A W K H"],
    blk_v: Float[Array, "B A W K H"],
    anchors: Int[Array, "B A"],
    starts: Int[Array, "B A"],
    do: Float[Array, "B A W N H"],
    *,
    causal: bool,
    window: int | None,
    scale: float,
    scores: int = 1 << 28,
) -> tuple[Array, Array, Array, Array, Array]:
    """Of the five float inputs, with at most `scores` bytes of scores at once (or those of one block).

    The forward is computed again; nothing is left out for being out of reach.
    """
    _, A, real_rows, N, _ = q.shape
    T = ctx_k.shape[1]
    W = 1 << (real_rows - 1).bit_length()  # XLA finds no tiles on a GPU for products of, say, 10 rows
    q, blk_k, blk_v, do = (
        jnp.pad(x, ((0, 0), (0, 0), (0, W - real_rows), (0, 0), (0, 0))) for x in (q, blk_k, blk_v, do)
    )
    own_seen = block_mask(W, causal, window) & (jnp.arange(W) < real_rows)
    chunk = max(1, min(A, scores // (4 * W * N * (T + W))))
    chunks = -(-A // chunk)

    def cut(x: Array) -> Array:  # [A ...] -> [chunks chunk ...]
        x = jnp.pad(x, [(0, chunks * chunk - A)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, chunk, *x.shape[1:])

    def of_sequence(given: tuple[Array, ...]) -> tuple[Array, ...]:
        q, k, v, blk_k, blk_v, anchors, starts, do = given

        def of_chunk(sums: tuple[Array, Array], blocks: tuple[Array, ...]) -> tuple:
            q, blk_k, blk_v, anchors, starts, do = (x[None] for x in blocks)

            def attend(q: Array, k: Array, v: Array, blk_k: Array, blk_v: Array) -> Array:
                context_seen = context_mask(anchors, starts, W, T, window)
                return masked_attention(q, k[None], v[None], blk_k, blk_v, context_seen, own_seen, scale)

            dq, dk, dv, dblk_k, dblk_v = jax.vjp(attend, q, k, v, blk_k, blk_v)[1](do)
            return (sums[0] + dk, sums[1] + dv), (dq[0], dblk_k[0], dblk_v[0])

        zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        of_blocks = tuple(cut(x) for x in (q, blk_k, blk_v, anchors, starts, do))
        (dk, dv), of_blocks = jax.lax.scan(of_chunk, zeros, of_blocks)
        dq, dblk_k, dblk_v = (x.reshape(-1, *x.shape[2:])[:A, :real_rows] for x in of_blocks)
        return dq, dk.astype(k.dtype), dv.astype(v.dtype), dblk_k, dblk_v

    return jax.lax.map(of_sequence, (q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts, do))
