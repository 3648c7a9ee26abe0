"""Blocks of rows at many anchors of one sequence against its shared context: the drafter's training attention."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.anchored_attention import gpu, reference, tpu
from pallas_kernels.dispatch import Implementation, dispatch

__all__ = ["anchored_attention"]


def anchored_attention(
    q: Float[Array, "B A W N H"],
    ctx_k: Float[Array, "B T K H"],
    ctx_v: Float[Array, "B T K H"],
    blk_k: Float[Array, "B A W K H"],
    blk_v: Float[Array, "B A W K H"],
    anchors: Int[Array, "B A"],
    *,
    causal: bool,
    window: int | None = None,
    scale: float,
    starts: Int[Array, "B A"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B A W N H"]:
    """Softmax in fp32 over the context strictly before each anchor and the block's own rows; no block sees another.

    Row w of block a stands at position `anchors[b, a] + w`; a window counts the query itself. Anchors may stand in any
    order and may be outside 0..T; ascending ones leave out the most work. Where several documents lie in one row, a
    block sees its own only: from `starts[b, a]` on, or from 0. Gradients go to the five float inputs: by autodiff of
    the reference (CPU, and GPU), by kernels of their own on a TPU.

    Raises:
        ValueError: for shapes that do not fit each other, a window below 1, or an `implementation` that does not take
            these shapes
    """
    starts = jnp.zeros_like(anchors) if starts is None else starts
    _check(q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts, window)
    return dispatch(
        implementation, q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts,
        reference=reference.anchored_attention,
        tpu=tpu.anchored_attention if tpu.takes(q, ctx_k) else None,
        gpu=gpu.anchored_attention if gpu.takes(q, ctx_k) else None,
        causal=causal, window=window, scale=scale,
    )  # fmt: skip


def _check(
    q: Array, ctx_k: Array, ctx_v: Array, blk_k: Array, blk_v: Array, anchors: Array, starts: Array, window: int | None
) -> None:
    B, A, W, N, H = q.shape
    T, K = ctx_k.shape[1:3]
    wanted = {"ctx_k": (B, T, K, H), "ctx_v": (B, T, K, H), "blk_k": (B, A, W, K, H), "blk_v": (B, A, W, K, H)}
    given = {"ctx_k": ctx_k, "ctx_v": ctx_v, "blk_k": blk_k, "blk_v": blk_v}
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} is {given[name].shape}; queries {q.shape} and context of {T} want {shape}")
        if given[name].dtype != q.dtype:
            raise ValueError(f"{name} is {given[name].dtype} and the queries are {q.dtype}; give one dtype")
    for name, places in (("anchors", anchors), ("starts", starts)):
        if places.shape != (B, A) or not jnp.issubdtype(places.dtype, jnp.integer):
            raise ValueError(f"{name} are {places.dtype} {places.shape}; give integers {(B, A)}")
    if N % K:
        raise ValueError(f"{N} query heads are not a multiple of {K} KV heads")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it counts the row itself, so give 1 or more, or None")
