"""Forward on a Hopper GPU: an online softmax over the walk of `walk_gpu`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.anchored_attention import walk_gpu as walk
from pallas_kernels.anchored_attention.reference import HIDDEN


def tile_context(head: int) -> int:
    """Context positions of one product: what fits shared memory and registers."""
    return 128 if head <= 128 else 64


def forward(
    options: walk.Options,
    q: Float[Array, "B R N H"],
    ctx_k: Float[Array, "B T K H"],
    ctx_v: Float[Array, "B T K H"],
    own_k: Float[Array, "B R K H"],
    own_v: Float[Array, "B R K H"],
    first: Int[Array, "B R"],
    end: Int[Array, "B R"],
) -> tuple[Float[Array, "B R N H"], Float[Array, "B N R"]]:
    """The output, and of each row the log2 of the sum of exp2. A row sees the context from `first` to before `end`."""
    B, R, N, H = q.shape
    tile, steps = tile_context(H), R // walk.STEP
    body = functools.partial(_kernel, options=options, tile=tile, steps=steps, group=N // ctx_k.shape[2])
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, R), jnp.float32)],
        grid=(N, steps, B),
        grid_names=("head", "step", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            hopper.swizzled((2, walk.ROWS, H), q.dtype),
            plgpu.SMEM((2, walk.ROWS), jnp.float32),
            walk.Ring.types(tile, H, q.dtype),
            plgpu.Barrier(num_barriers=2),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(first, end, walk.step_tiles(first, end, tile), q, ctx_k, ctx_v, own_k, own_v)


def _kernel(
    first, end, limits, q, ctx_k, ctx_v, own_k, own_v, out, lse, q_smem, lse_smem, ring, q_ready,
    *, options: walk.Options, tile: int, steps: int, group: int,
) -> None:  # fmt: skip
    wg, place = jax.lax.axis_index("warpgroup"), walk.Place.here(limits, steps, group)

    @pl.when(wg < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        here, mine = pl.ds(place.step * walk.STEP + wg * walk.ROWS, walk.ROWS), q_smem.at[wg]
        plgpu.copy_gmem_to_smem(q.at[place.b, here, place.head], mine, q_ready.at[wg])
        plgpu.barrier_wait(q_ready.at[wg])

        def absorb(slot: Array, carry: tuple, masked: Callable) -> tuple:
            acc, top, total = carry
            plgpu.barrier_wait(ring.k_ready.at[slot])
            scores = hopper.product(mine, ring.k.at[slot]) * (options.scale * walk.LOG2_E)
            plgpu.barrier_arrive(ring.k_free.at[slot])
            scores = masked(scores, HIDDEN)
            new = jnp.maximum(top, scores.max(axis=1))
            weights = jnp.exp2(scores - walk.along(new, scores.shape))
            old = jnp.exp2(top - new)
            total = total * old + weights.sum(axis=1)
            acc = acc * walk.along(old, acc.shape)
            plgpu.barrier_wait(ring.v_ready.at[slot])
            acc = hopper.plus_product(acc, weights.astype(mine.dtype), ring.v.at[slot])
            plgpu.barrier_arrive(ring.v_free.at[slot])
            return acc, new, total

        top, total = (plgpu.layout_cast(jnp.full((walk.ROWS,), x, jnp.float32), walk.BY_ROW) for x in (HIDDEN, 0.0))
        seen = tuple(hopper.load(ref.at[place.b, here], walk.BY_ROW) for ref in (first, end))
        carry = walk.zeros(walk.ROWS, mine.shape[1]), top, total
        acc, top, total = walk.over_tiles(options, tile, wg, place, seen, absorb, carry)
        mine[...] = (acc / walk.along(total, acc.shape)).astype(mine.dtype)
        lse_smem[wg] = top + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out.at[place.b, here, place.head])
        plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse.at[place.b, place.head, here])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
        walk.copy_tiles(tile, place, (own_k, own_v), (ctx_k, ctx_v), ring)
