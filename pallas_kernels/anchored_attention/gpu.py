"""The drafter's training attention on a Hopper GPU: rows padded to whole steps, and the kernels' own gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.anchored_attention.backward_gpu import backward
from pallas_kernels.anchored_attention.forward_gpu import forward
from pallas_kernels.anchored_attention.walk_gpu import ROWS, STEP, Options


def takes(q: Float[Array, "B A W N H"], ctx_k: Float[Array, "B T K H"]) -> bool:
    """bf16 heads of 64 or 128, blocks of at most 64 rows; the reference runs the others.

    Heads of 256 have the forward alone: the backward's sums would not fit the registers.
    """
    rows, head = q.shape[2], q.shape[-1]
    return q.dtype == jnp.bfloat16 and head in (64, 128) and rows <= ROWS and ctx_k.shape[1] > 0


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
    window: int | None,
    scale: float,
) -> Float[Array, "B A W N H"]:
    """As the reference. All context rows must be finite: a row that no block sees is multiplied by 0."""
    B, A, real_rows = q.shape[:3]
    T, W = ctx_k.shape[1], 1 << (real_rows - 1).bit_length()  # so that no block lies across two warpgroups
    more = -A % (STEP // W)

    def rows(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, more), (0, W - real_rows), (0, 0), (0, 0)))
        return x.reshape(B, -1, *x.shape[3:])

    keys, values = (jnp.pad(x, ((0, 0), (0, -T % STEP), (0, 0), (0, 0))) for x in (ctx_k, ctx_v))
    # Padding blocks repeat the last one, so that no step sees more for them.
    anchors, starts = (jnp.pad(x.astype(jnp.int32), ((0, 0), (0, more)), mode="edge") for x in (anchors, starts))
    first, end = (jnp.repeat(x, W, axis=1) for x in (starts, jnp.clip(anchors, 0, T)))  # of the context a row sees
    if window is not None:
        first = jnp.maximum(first, (anchors[..., None] + jnp.arange(W) - window + 1).reshape(B, -1))
    options = Options(W, real_rows, causal, window, scale)
    out = _attend(options, rows(q), keys, values, rows(blk_k), rows(blk_v), first, end)
    return out.reshape(B, -1, W, *q.shape[3:])[:, :A, :real_rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, *arrays: Array) -> Array:
    return forward(options, *arrays)[0]


def _attend_forward(options: Options, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    out, lse = forward(options, *arrays)
    return out, (*arrays, out, lse)


def _attend_backward(options: Options, saved: tuple[Array, ...], do: Array) -> tuple[Array | None, ...]:
    return *backward(options, do, *saved), None, None


_attend.defvjp(_attend_forward, _attend_backward)
