"""Backward on a Hopper GPU: one kernel for the queries' gradients, one for those of the context's keys and values.

Both make the weights again from what the forward kept of each row. The rows' own keys and values, W a row, are XLA's.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.anchored_attention.forward_gpu import (
    BY_ROW,
    LOG2_E,
    ROWS,
    STAGES,
    STEP,
    WGMMA,
    Options,
    Place,
    Ring,
    along,
    copy_tiles,
    drain,
    over_tiles,
    step_tiles,
    zeros,
)  # fmt: skip
from pallas_kernels.anchored_attention.reference import block_mask

TILE = 64  # keys of one product: two tiles of scores and the sums fit the registers
BY_COLUMN = WGMMA.reduce(0)


def backward(
    options: Options,
    do: Float[Array, "B R N H"],
    q: Float[Array, "B R N H"],
    ctx_k: Float[Array, "B T K H"],
    ctx_v: Float[Array, "B T K H"],
    own_k: Float[Array, "B R K H"],
    own_v: Float[Array, "B R K H"],
    first: Int[Array, "B R"],
    end: Int[Array, "B R"],
    out: Float[Array, "B R N H"],
    lse: Float[Array, "B N R"],
) -> tuple[Array, ...]:
    """Gradients of the five float inputs, in their order and dtypes; `do` is the output's."""
    mean = jnp.einsum("brnh,brnh->bnr", do.astype(jnp.float32), out.astype(jnp.float32))
    dq = _of_queries(options, q, ctx_k, ctx_v, own_k, own_v, first, end, do, lse, mean)
    dk, dv = _of_context(options, q, ctx_k, ctx_v, first, end, do, lse, mean)
    return dq, dk, dv, *_of_own(options, q, own_k, own_v, do, lse, mean)


def _of_queries(options: Options, q, ctx_k, ctx_v, own_k, own_v, first, end, do, lse, mean) -> Array:
    B, R, N, H = q.shape
    steps = R // STEP
    body = functools.partial(_queries_kernel, options=options, steps=steps, group=N // ctx_k.shape[2])
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(N, steps, B),
        grid_names=("head", "step", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            hopper.swizzled((2, ROWS, H), q.dtype),
            hopper.swizzled((2, ROWS, H), q.dtype),
            Ring.types(TILE, H, q.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(first, end, step_tiles(first, end, TILE), q, ctx_k, ctx_v, own_k, own_v, do, lse, mean)


def _queries_kernel(
    first, end, limits, q, ctx_k, ctx_v, own_k, own_v, do, lse, mean, dq, q_smem, do_smem, ring, ready,
    *, options: Options, steps: int, group: int,
) -> None:  # fmt: skip
    wg, place = jax.lax.axis_index("warpgroup"), Place.here(limits, steps, group)

    @pl.when(wg < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        here, mine, given = pl.ds(place.step * STEP + wg * ROWS, ROWS), q_smem.at[wg], do_smem.at[wg]
        plgpu.copy_gmem_to_smem(q.at[place.b, here, place.head], mine, ready.at[wg])
        plgpu.copy_gmem_to_smem(do.at[place.b, here, place.head], given, ready.at[wg])
        total, average = (hopper.load(ref.at[place.b, place.head, here], BY_ROW) for ref in (lse, mean))
        seen = tuple(hopper.load(ref.at[place.b, here], BY_ROW) for ref in (first, end))
        plgpu.barrier_wait(ready.at[wg])

        def absorb(slot: Array, acc: Array, masked: Callable) -> Array:
            keys, values = ring.k.at[slot], ring.v.at[slot]
            plgpu.barrier_wait(ring.k_ready.at[slot])
            scores = hopper.product(mine, keys) * (options.scale * LOG2_E)
            weights = masked(jnp.exp2(scores - along(total, scores.shape)), 0.0)
            plgpu.barrier_wait(ring.v_ready.at[slot])
            of_weights = hopper.product(given, values)
            plgpu.barrier_arrive(ring.v_free.at[slot])
            of_scores = weights * (of_weights - along(average, scores.shape))
            acc = hopper.plus_product(acc, of_scores.astype(mine.dtype), keys)
            plgpu.barrier_arrive(ring.k_free.at[slot])
            return acc

        acc = over_tiles(options, TILE, wg, place, seen, absorb, zeros(ROWS, mine.shape[1]))
        mine[...] = (acc * options.scale).astype(mine.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, dq.at[place.b, here, place.head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
        copy_tiles(TILE, place, (own_k, own_v), (ctx_k, ctx_v), ring)


class RowRing(NamedTuple):
    """Buffers of 64 rows: queries, the output's gradient, and four numbers a row."""

    q: Any
    do: Any
    first: Any
    end: Any
    lse: Any
    mean: Any


def _of_context(options: Options, q, ctx_k, ctx_v, first, end, do, lse, mean) -> tuple[Array, Array]:
    B, _, N, H = q.shape
    T, K = ctx_k.shape[1:3]
    rows, numbers = hopper.swizzled((STAGES, ROWS, H), q.dtype), plgpu.SMEM((STAGES, ROWS), jnp.float32)
    places, own = plgpu.SMEM((STAGES, ROWS), jnp.int32), hopper.swizzled((2, ROWS, H), q.dtype)
    body = functools.partial(_context_kernel, options=options, tiles=T // STEP, group=N // K)
    dk, dv = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(ctx_k.shape, q.dtype)] * 2,
        grid=(K, T // STEP, B),
        grid_names=("head", "tile", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            own,
            own,
            RowRing(rows, rows, places, places, numbers, numbers),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_arrivals=len(RowRing._fields), num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(row_tiles(first, end, T), first, end, q, do, lse, mean, ctx_k, ctx_v)
    return dk, dv


def row_tiles(first: Int[Array, "B R"], end: Int[Array, "B R"], length: int) -> Int[Array, "2 BJ"]:
    """Of every 128 context positions: the first 64 rows of which one sees one of them, and behind the last ones."""
    low, high = (x.reshape(len(x), 1, -1, ROWS) for x in (first, end))
    start = jnp.arange(0, length, STEP)[None, :, None]
    seen = (low.min(-1) < start + STEP) & (high.max(-1) > start)
    stop = jnp.where(seen.any(-1), seen.shape[-1] - jnp.argmax(jnp.flip(seen, -1), -1), 0)
    return jnp.stack([jnp.argmax(seen, -1), stop]).astype(jnp.int32).reshape(2, -1)


def _context_kernel(
    limits, first, end, q, do, lse, mean, ctx_k, ctx_v, dk, dv, k_smem, v_smem, ring, own_ready, ready, free,
    *, options: Options, tiles: int, group: int,
) -> None:  # fmt: skip
    kv_head, tile, b, wg = (jax.lax.axis_index(name) for name in ("head", "tile", "batch", "warpgroup"))
    begin, stop = (limits[i, b * tiles + tile] for i in range(2))
    total = (stop - begin) * group

    @pl.when(wg < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        start = tile * STEP + wg * ROWS
        keys, values = k_smem.at[wg], v_smem.at[wg]
        for source, smem in ((ctx_k, keys), (ctx_v, values)):
            plgpu.copy_gmem_to_smem(source.at[b, pl.ds(start, ROWS), kv_head], smem, own_ready.at[wg])
        plgpu.barrier_wait(own_ready.at[wg])
        shape = ROWS, ROWS

        def absorb(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            slot = jax.lax.rem(i, jnp.int32(STAGES))
            plgpu.barrier_wait(ready.at[slot])
            rows, given = ring.q.at[slot], ring.do.at[slot]

            def of_rows(ref: Any) -> Array:  # loaded where it is needed: four of them would fill the registers
                return along(hopper.load(ref.at[slot], BY_COLUMN), shape, 1)

            scores = hopper.product(keys, rows) * (options.scale * LOG2_E)  # [keys, rows]
            weights = jnp.exp2(scores - of_rows(ring.lse))
            t = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + start
            weights = jnp.where((t >= of_rows(ring.first)) & (t < of_rows(ring.end)), weights, 0.0)
            of_weights = hopper.product(values, given)
            dvalues = hopper.plus_product(carry[1], weights.astype(keys.dtype), given)
            of_scores = weights * (of_weights - of_rows(ring.mean))
            dkeys = hopper.plus_product(carry[0], of_scores.astype(keys.dtype), rows)
            plgpu.barrier_arrive(free.at[slot])
            return dkeys, dvalues

        carry = zeros(ROWS, keys.shape[1]), zeros(ROWS, keys.shape[1])
        sums = jax.lax.fori_loop(jnp.int32(0), total, absorb, carry)
        for smem, x, target in ((keys, sums[0] * options.scale, dk), (values, sums[1], dv)):
            smem[...] = x.astype(smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, target.at[b, pl.ds(start, ROWS), kv_head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def fill(i: Array, _: None) -> None:
            slot, of_head = jax.lax.rem(i, jnp.int32(STAGES)), jax.lax.div(i, stop - begin)
            head = kv_head * group + of_head
            here = pl.ds((begin + i - of_head * (stop - begin)) * ROWS, ROWS)

            @pl.when(i >= STAGES)
            def _wait():
                plgpu.barrier_wait(free.at[slot])

            sources = RowRing(
                q.at[b, here, head], do.at[b, here, head], first.at[b, here], end.at[b, here],
                lse.at[b, head, here], mean.at[b, head, here],
            )  # fmt: skip
            for source, buffers in zip(sources, ring, strict=True):
                plgpu.copy_gmem_to_smem(source, buffers.at[slot], ready.at[slot])

        jax.lax.fori_loop(jnp.int32(0), total, fill, None)
        drain(total, free)


def _of_own(options: Options, q, own_k, own_v, do, lse, mean) -> tuple[Array, ...]:
    """Of the blocks' own keys and values."""
    B, _, N, H = q.shape
    K, W = own_k.shape[2], options.rows
    q, do = (x.reshape(B, -1, W, K, N // K, H) for x in (q, do))
    keys, values = (x.reshape(B, -1, W, K, H) for x in (own_k, own_v))
    lse, mean = (x.reshape(B, K, N // K, -1, W, 1) for x in (lse, mean))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    seen = block_mask(W, options.causal, options.window) & (jnp.arange(W) < options.real_rows)
    scores = product("bawkgh,bavkh->bkgawv", q, keys) * (options.scale * LOG2_E)
    weights = jnp.where(seen, jnp.exp2(scores - lse), 0.0)
    of_scores = weights * (product("bawkgh,bavkh->bkgawv", do, values) - mean) * options.scale
    dk = product("bkgawv,bawkgh->bavkh", of_scores.astype(q.dtype), q)
    dv = product("bkgawv,bawkgh->bavkh", weights.astype(q.dtype), do)
    return tuple(x.reshape(own_k.shape).astype(q.dtype) for x in (dk, dv))
