"""The drafter's training attention on a Hopper GPU: the forward as a kernel, the backward by chunks of the reference.

A thread block takes 128 rows of one query head (2 warpgroups of 64 rows; whole blocks of W rows each). Its first keys
are those same 128 rows' own ones, then come the context's tiles; a third warpgroup copies both into a ring of buffers.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.anchored_attention.bounds import bounds
from pallas_kernels.anchored_attention.chunked import gradients
from pallas_kernels.anchored_attention.reference import HIDDEN

ROWS = 64  # of a warpgroup, the height of its matrix instruction
STAGES = 2
WGMMA = plgpu.Layout.WGMMA


def takes(q: Float[Array, "B A W N H"], ctx_k: Float[Array, "B T K H"]) -> bool:
    """bf16 heads of 64, 128 or 256, blocks of at most 64 rows; the reference runs the others."""
    rows, head = q.shape[2], q.shape[-1]
    return q.dtype == jnp.bfloat16 and head in (64, 128, 256) and rows <= ROWS and ctx_k.shape[1] > 0


def tile_context(head: int) -> int:
    """Context positions of one product: what fits shared memory and registers."""
    return 128 if head <= 128 else 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10))
def _attend(q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts, causal, window, scale, interpret):
    return _forward(q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts, causal, window, scale, interpret)


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
    interpret: Any = None,
) -> Float[Array, "B A W N H"]:
    """As the reference. All context rows must be finite: a row that no block sees is multiplied by 0."""
    return _attend(q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts, causal, window, scale, interpret)


def _attend_forward(*arguments):
    return _attend(*arguments), arguments[:7]


def _attend_backward(causal, window, scale, interpret, saved, do):
    q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts = saved
    options = {"causal": causal, "window": window, "scale": scale}
    return *gradients(q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts, do, **options), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts, causal, window, scale, interpret) -> Array:
    B, A, real_rows, N, H = q.shape
    T, K = ctx_k.shape[1:3]
    W = 1 << (real_rows - 1).bit_length()  # so that no block lies across two warpgroups
    tile = tile_context(H)
    step_anchors = 2 * ROWS // W
    more = -A % step_anchors

    def flat(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, more), (0, W - real_rows), (0, 0), (0, 0)))
        return x.reshape(B, -1, *x.shape[3:])

    def whole_tiles(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, -T % tile), (0, 0), (0, 0)))

    anchors, starts = (jnp.pad(x.astype(jnp.int32), ((0, 0), (0, more)), mode="edge") for x in (anchors, starts))
    limits = bounds(anchors, starts, per_step=step_anchors, rows=W, tile=tile, length=T, window=window)
    first, end = (jnp.repeat(x, W, axis=1) for x in (starts, jnp.minimum(anchors, T)))  # of the context that a row sees
    if window is not None:
        first = jnp.maximum(first, (anchors[..., None] + jnp.arange(W) - window + 1).reshape(B, -1))
    steps = anchors.shape[1] // step_anchors
    body = functools.partial(
        _kernel, rows=W, real_rows=real_rows, group=N // K, tile=tile, steps=steps, causal=causal, window=window,
        scale=scale, interpreted=interpret is not None,
    )  # fmt: skip
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B, steps * 2 * ROWS, N, H), q.dtype),
        grid=(N, steps, B),
        grid_names=("head", "step", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            hopper.swizzled((2, ROWS, H), q.dtype),
            hopper.swizzled((STAGES, tile, H), q.dtype),
            hopper.swizzled((STAGES, tile, H), q.dtype),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(first, end, limits, flat(q), whole_tiles(ctx_k), whole_tiles(ctx_v), flat(blk_k), flat(blk_v))
    return out.reshape(B, -1, W, N, H)[:, :A, :real_rows]


def _kernel(
    first, end, limits, q_gmem, ctx_k, ctx_v, blk_k, blk_v, out, q_smem, k_smem, v_smem,
    q_ready, k_ready, v_ready, k_free, v_free,
    *, rows, real_rows, group, tile, steps, causal, window, scale, interpreted,
):  # fmt: skip
    head, step, b, wg = (jax.lax.axis_index(name) for name in ("head", "step", "batch", "warpgroup"))
    own = 2 * ROWS // tile  # tiles of the step's own keys come first
    begin, whole_begin, whole_end, stop = (limits[i, b * steps + step] for i in range(4))
    total = own + stop - begin
    laid = (lambda x, _: x) if interpreted else plgpu.layout_cast  # the interpreter has no layouts

    def load(ref: Any) -> Array:
        return ref[...] if interpreted else hopper.load(ref, WGMMA.reduce(1))

    @pl.when(wg < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        here = pl.ds(step * 2 * ROWS + wg * ROWS, ROWS)
        mine = q_smem.at[wg]
        plgpu.copy_gmem_to_smem(q_gmem.at[b, here, head], mine, q_ready.at[wg])
        plgpu.barrier_wait(q_ready.at[wg])

        def absorb(i: Array, carry: tuple, mask: Any) -> tuple:
            acc, top, denominator = carry
            slot = jax.lax.rem(i, jnp.int32(STAGES))
            plgpu.barrier_wait(k_ready.at[slot])

            scores = _scores(mine, k_smem.at[slot], interpreted) * (scale * math.log2(math.e))
            plgpu.barrier_arrive(k_free.at[slot])
            scores = scores if mask is None else jnp.where(mask(i), scores, HIDDEN)
            new = jnp.maximum(top, scores.max(axis=1))
            weights = jnp.exp2(scores - _along(new, scores.shape))
            old = jnp.exp2(top - new)
            denominator = denominator * old + weights.sum(axis=1)
            acc = acc * _along(old, acc.shape)
            plgpu.barrier_wait(v_ready.at[slot])
            acc = _add_product(acc, weights.astype(mine.dtype), v_smem.at[slot], interpreted)
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, new, denominator

        def places() -> tuple[Array, Array]:
            shape = (ROWS, tile)
            return tuple(laid(jax.lax.broadcasted_iota(jnp.int32, shape, axis), WGMMA) for axis in (0, 1))

        def block_of(x: Array) -> Array:  # rows is a power of two
            return jax.lax.shift_right_logical(x, jnp.full_like(x, rows.bit_length() - 1))

        def own_mask(i: Array) -> Array:
            row, key = places()
            row, key = row + wg * ROWS, key + i * tile  # in the step
            seen = (block_of(row) == block_of(key)) & ((key & (rows - 1)) < real_rows)
            if causal:
                seen &= key <= row
            return seen if window is None else seen & (row - key < window)

        def context_mask(i: Array) -> Array:
            _, t = places()
            t += (begin + i - own) * tile
            return (t >= _along(low, t.shape)) & (t < _along(high, t.shape))

        low, high = (load(ref.at[b, here]) for ref in (first, end))
        top, denominator = (laid(jnp.full((ROWS,), x, jnp.float32), WGMMA.reduce(1)) for x in (HIDDEN, 0.0))
        carry = laid(jnp.zeros((ROWS, mine.shape[1]), jnp.float32), WGMMA), top, denominator
        ends = (own, own + whole_begin - begin, own + whole_end - begin, total)
        done = 0
        for until, mask in zip(ends, (own_mask, context_mask, None, context_mask), strict=True):
            carry = jax.lax.fori_loop(
                jnp.int32(done), jnp.int32(until), lambda i, c, mask=mask: absorb(i, c, mask), carry
            )
            done = until
        acc, _, denominator = carry
        mine[...] = (acc / _along(denominator, acc.shape)).astype(mine.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out.at[b, here, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = jax.lax.div(head, jnp.int32(group))

        def fill(i: Array, _: None) -> None:
            slot = jax.lax.rem(i, jnp.int32(STAGES))
            for block, context, smem, ready, free in (
                (blk_k, ctx_k, k_smem, k_ready, k_free),
                (blk_v, ctx_v, v_smem, v_ready, v_free),
            ):

                @pl.when(i >= STAGES)
                def _wait(free=free):
                    plgpu.barrier_wait(free.at[slot])

                @pl.when(i < own)
                def _own(block=block, smem=smem, ready=ready):
                    at = pl.ds(step * 2 * ROWS + i * tile, tile)
                    plgpu.copy_gmem_to_smem(block.at[b, at, kv_head], smem.at[slot], ready.at[slot])

                @pl.when(i >= own)
                def _context(context=context, smem=smem, ready=ready):
                    at = pl.ds((begin + i - own) * tile, tile)
                    plgpu.copy_gmem_to_smem(context.at[b, at, kv_head], smem.at[slot], ready.at[slot])

        jax.lax.fori_loop(jnp.int32(0), total, fill, None)

        def drain(i: Array, _: None) -> None:  # leave no barrier with a phase that was not waited for
            slot = jax.lax.rem(i, jnp.int32(STAGES))
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(v_free.at[slot])

        jax.lax.fori_loop(jnp.maximum(total - STAGES, 0), total, drain, None)


def _along(x: Array, shape: tuple[int, ...]) -> Array:
    return jax.lax.broadcast_in_dim(x, shape, [0])


# The interpreter knows neither the transposed operand nor `run_state`: there, plain products stand in for wgmma.
def _scores(q: Any, keys: Any, interpreted: bool) -> Array:
    if interpreted:
        return jnp.dot(q[...], keys[...].T, preferred_element_type=jnp.float32)

    def product(ref: Any) -> Array:
        plgpu.wgmma(ref, q, keys.transpose((1, 0)))
        return ref[...]

    return hopper.accumulated(product, (q.shape[0], keys.shape[0]))


def _add_product(acc: Array, weights: Array, values: Any, interpreted: bool) -> Any:
    if interpreted:
        return acc + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(plgpu.ACC.init(acc))
