"""Gradients of the context's keys and values on a Hopper GPU: a thread block has 128 positions of a KV head.

Two warpgroups take 64 positions each; a third copies the rows that see them into a ring, 64 of a query head at a time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels import hopper
from pallas_kernels.anchored_attention import walk_gpu as walk

BY_COLUMN = walk.WGMMA.reduce(0)


class RowRing(NamedTuple):
    """Buffers of 64 rows: queries, the output's gradient, and four numbers a row."""

    q: Any
    do: Any
    first: Any
    end: Any
    lse: Any
    mean: Any


def of_context(options: walk.Options, q, ctx_k, ctx_v, first, end, do, lse, mean) -> tuple[Array, Array]:
    """dk and dv."""
    B, _, N, H = q.shape
    T, K = ctx_k.shape[1:3]
    rows, numbers = (
        hopper.swizzled((walk.STAGES, walk.ROWS, H), q.dtype),
        plgpu.SMEM((walk.STAGES, walk.ROWS), jnp.float32),
    )
    places, own = plgpu.SMEM((walk.STAGES, walk.ROWS), jnp.int32), hopper.swizzled((2, walk.ROWS, H), q.dtype)
    body = functools.partial(_kernel, options=options, tiles=T // walk.STEP, group=N // K)
    dk, dv = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(ctx_k.shape, q.dtype)] * 2,
        grid=(K, T // walk.STEP, B),
        grid_names=("head", "tile", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            own,
            own,
            RowRing(rows, rows, places, places, numbers, numbers),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_arrivals=len(RowRing._fields), num_barriers=walk.STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=walk.STAGES),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(row_tiles(first, end, T), first, end, q, do, lse, mean, ctx_k, ctx_v)
    return dk, dv


def row_tiles(first: Int[Array, "B R"], end: Int[Array, "B R"], length: int) -> Int[Array, "2 BJ"]:
    """Of every 128 context positions: the first 64 rows of which one sees one of them, and behind the last ones."""
    low, high = (x.reshape(len(x), 1, -1, walk.ROWS) for x in (first, end))
    start = jnp.arange(0, length, walk.STEP)[None, :, None]
    seen = (low.min(-1) < start + walk.STEP) & (high.max(-1) > start)
    stop = jnp.where(seen.any(-1), seen.shape[-1] - jnp.argmax(jnp.flip(seen, -1), -1), 0)
    return jnp.stack([jnp.argmax(seen, -1), stop]).astype(jnp.int32).reshape(2, -1)


def _kernel(
    limits, first, end, q, do, lse, mean, ctx_k, ctx_v, dk, dv, k_smem, v_smem, ring, own_ready, ready, free,
    *, options: walk.Options, tiles: int, group: int,
) -> None:  # fmt: skip
    kv_head, tile, b, wg = (jax.lax.axis_index(name) for name in ("head", "tile", "batch", "warpgroup"))
    begin, stop = (limits[i, b * tiles + tile] for i in range(2))
    total = (stop - begin) * group

    @pl.when(wg < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        start = tile * walk.STEP + wg * walk.ROWS
        keys, values = k_smem.at[wg], v_smem.at[wg]
        for source, smem in ((ctx_k, keys), (ctx_v, values)):
            plgpu.copy_gmem_to_smem(source.at[b, pl.ds(start, walk.ROWS), kv_head], smem, own_ready.at[wg])
        plgpu.barrier_wait(own_ready.at[wg])
        shape = walk.ROWS, walk.ROWS

        def absorb(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            slot = jax.lax.rem(i, jnp.int32(walk.STAGES))
            plgpu.barrier_wait(ready.at[slot])
            rows, given = ring.q.at[slot], ring.do.at[slot]

            def of_rows(ref: Any) -> Array:  # loaded where it is needed: four of them would fill the registers
                return walk.along(hopper.load(ref.at[slot], BY_COLUMN), shape, 1)

            scores = hopper.product(keys, rows) * (options.scale * walk.LOG2_E)  # [keys, rows]
            weights = jnp.exp2(scores - of_rows(ring.lse))
            t = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=walk.WGMMA) + start
            weights = jnp.where((t >= of_rows(ring.first)) & (t < of_rows(ring.end)), weights, 0.0)
            of_weights = hopper.product(values, given)
            dvalues = hopper.plus_product(carry[1], weights.astype(keys.dtype), given)
            of_scores = weights * (of_weights - of_rows(ring.mean))
            dkeys = hopper.plus_product(carry[0], of_scores.astype(keys.dtype), rows)
            plgpu.barrier_arrive(free.at[slot])
            return dkeys, dvalues

        carry = walk.zeros(walk.ROWS, keys.shape[1]), walk.zeros(walk.ROWS, keys.shape[1])
        sums = jax.lax.fori_loop(jnp.int32(0), total, absorb, carry)
        for smem, x, target in ((keys, sums[0] * options.scale, dk), (values, sums[1], dv)):
            smem[...] = x.astype(smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, target.at[b, pl.ds(start, walk.ROWS), kv_head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def fill(i: Array, _: None) -> None:
            slot, of_head = jax.lax.rem(i, jnp.int32(walk.STAGES)), jax.lax.div(i, stop - begin)
            head = kv_head * group + of_head
            here = pl.ds((begin + i - of_head * (stop - begin)) * walk.ROWS, walk.ROWS)

            @pl.when(i >= walk.STAGES)
            def _wait():
                plgpu.barrier_wait(free.at[slot])

            sources = RowRing(
                q.at[b, here, head], do.at[b, here, head], first.at[b, here], end.at[b, here],
                lse.at[b, head, here], mean.at[b, head, here],
            )  # fmt: skip
            for source, buffers in zip(sources, ring, strict=True):
                plgpu.copy_gmem_to_smem(source, buffers.at[slot], ready.at[slot])

        jax.lax.fori_loop(jnp.int32(0), total, fill, None)
        walk.drain(total, free)
