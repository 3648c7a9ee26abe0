"""Gradients by autodiff of the reference, some blocks at a time: what a platform without a backward kernel runs."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.anchored_attention.reference import HIDDEN, block_mask, context_mask


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
    B, A, real_rows, N, _ = q.shape
    T = ctx_k.shape[1]
    W = 1 << (real_rows - 1).bit_length()  # XLA finds no tiles on a GPU for products of, say, 10 rows
    q, blk_k, blk_v, do = (
        jnp.pad(x, ((0, 0), (0, 0), (0, W - real_rows), (0, 0), (0, 0))) for x in (q, blk_k, blk_v, do)
    )
    own_seen = block_mask(W, causal, window) & (jnp.arange(W) < real_rows)
    fit = max(1, scores // (4 * W * N * (T + W)))  # blocks: of one sequence, or all of some
    chunk = min(A, fit)
    chunks = -(-A // chunk)
    sequences = -(-B // -(-B // max(1, fit // A)))  # as even as can be, since what is left over is compiled apart

    def cut(x: Array) -> Array:  # [A ...] -> [chunks chunk ...]
        x = jnp.pad(x, [(0, chunks * chunk - A)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, chunk, *x.shape[1:])

    def of_sequence(given: tuple[Array, ...]) -> tuple[Array, ...]:
        q, k, v, blk_k, blk_v, anchors, starts, do = given

        def of_chunk(sums: tuple[Array, Array], blocks: tuple[Array, ...]) -> tuple:
            q, blk_k, blk_v, anchors, starts, do = blocks
            seen = context_mask(anchors, starts, W, T, window), own_seen
            dq, dk, dv, *own = _of_blocks(q, k, v, blk_k, blk_v, do, *seen, scale)
            return (sums[0] + dk, sums[1] + dv), (dq, *own)

        zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        of_blocks = tuple(cut(x) for x in (q, blk_k, blk_v, anchors, starts, do))
        (dk, dv), of_blocks = jax.lax.scan(of_chunk, zeros, of_blocks)
        dq, dblk_k, dblk_v = (x.reshape(-1, *x.shape[2:])[:A, :real_rows] for x in of_blocks)
        return dq, dk.astype(k.dtype), dv.astype(v.dtype), dblk_k, dblk_v

    given = q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts, do
    return jax.lax.map(of_sequence, given, batch_size=sequences)


def _of_blocks(
    q: Float[Array, "A W N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    blk_k: Float[Array, "A W K H"],
    blk_v: Float[Array, "A W K H"],
    do: Float[Array, "A W N H"],
    seen: Bool[Array, "A #W T"],
    own_seen: Bool[Array, "W W"],
    scale: float,
) -> tuple[Array, ...]:
    """Of q, the context's keys and values (fp32), and the blocks' own; products take what they are given in q's dtype."""
    A, W, N, H = q.shape
    K = k.shape[1]
    grouped, do = (x.reshape(A, W, K, N // K, H) for x in (q, do))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def against(x: Array, keys: Array, own_keys: Array) -> tuple[Array, Array]:
        return product("awkgh,tkh->kgawt", x, keys), product("awkgh,avkh->kgawv", x, own_keys)

    logits = zip(against(grouped, k, blk_k), (seen, own_seen), strict=True)
    logits = [jnp.where(mask, s * scale, HIDDEN) for s, mask in logits]
    most = jnp.maximum(*(jnp.max(s, -1, keepdims=True, initial=HIDDEN) for s in logits))
    weights = [jnp.exp(s - most) for s in logits]
    total = sum(jnp.sum(w, -1, keepdims=True) for w in weights)
    weights = [w / total for w in weights]
    given = against(do, v, blk_v)
    mean = sum(jnp.sum(w * g, -1, keepdims=True) for w, g in zip(weights, given, strict=True))
    slopes = [(w * (g - mean) * scale).astype(q.dtype) for w, g in zip(weights, given, strict=True)]
    weights = [w.astype(q.dtype) for w in weights]
    dq = product("kgawt,tkh->awkgh", slopes[0], k) + product("kgawv,avkh->awkgh", slopes[1], blk_k)
    dk, dv = (product("kgawt,awkgh->tkh", s, x) for s, x in ((slopes[0], grouped), (weights[0], do)))
    own = (product("kgawv,awkgh->avkh", s, x) for s, x in ((slopes[1], grouped), (weights[1], do)))
    return dq.reshape(q.shape).astype(q.dtype), dk, dv, *(x.astype(q.dtype) for x in own)
