"""The drafter's training attention on a TPU: shapes padded to the plan, and the kernels' own gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.anchored_attention.backward_tpu import backward
from pallas_kernels.anchored_attention.forward_tpu import Options, forward
from pallas_kernels.anchored_attention.plan import Plan, Tiles, make_plan


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
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Float[Array, "B A W N H"]:
    """As the reference. Anchors may stand in any order; ascending ones leave out the most work."""
    plan = make_plan(q.shape, blk_k.shape[3], ctx_k.shape[1], q.dtype.itemsize, tiles)
    options = Options(plan, causal, window, scale, interpret)
    q_rows, block_k, block_v = (_rows(x, plan) for x in (q, blk_k, blk_v))
    keys, values = (_flat(_pad(x, {1: plan.context, 3: plan.head})) for x in (ctx_k, ctx_v))
    # Padding blocks repeat the last anchor: another one would make the last step's rows differ more in what they see.
    more = ((0, 0), (0, plan.anchors - anchors.shape[1]))
    anchors, starts = (jnp.pad(x.astype(jnp.int32), more, mode="edge") for x in (anchors, starts))
    out = _attend(options, q_rows, keys, values, block_k, block_v, anchors, starts)
    out = out.reshape(*out.shape[:1], plan.anchors, plan.rows, q.shape[3], plan.head)
    return out[:, : q.shape[1], : q.shape[2], :, : q.shape[4]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, *arrays: Array) -> Array:
    return forward(options, *arrays)[0]


def _forward(options: Options, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    out, lse = forward(options, *arrays)
    return out, (*arrays, out, lse)


def _backward(options: Options, saved: tuple[Array, ...], do: Array) -> tuple[Array | None, ...]:
    return *backward(options, *saved, do), None, None


_attend.defvjp(_forward, _backward)


def _rows(x: Float[Array, "B A W N H"], plan: Plan) -> Float[Array, "B AW NH"]:
    return _flat(_pad(x, {1: plan.anchors, 2: plan.rows, 4: plan.head}).reshape(x.shape[0], -1, x.shape[3], plan.head))


def _flat(x: Float[Array, "B T K H"]) -> Float[Array, "B T KH"]:
    return x.reshape(*x.shape[:2], -1)


def _pad(x: Array, sizes: dict[int, int]) -> Array:
    """Zeros behind each axis of `sizes` up to its size; `x` itself where there is nothing to add."""
    widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def takes(q: Float[Array, "B A W N H"], ctx_k: Float[Array, "B T K H"]) -> bool:
    """Heads of 64 or a multiple of 128, bf16 or fp32; smaller ones would leave most of the matrix unit empty."""
    head, context = q.shape[-1], ctx_k.shape[1]
    return (head == 64 or head % 128 == 0) and context > 0 and q.dtype in (jnp.bfloat16, jnp.float32)
