"""Backward on a Hopper GPU: one kernel for the queries' gradients, one for those of the context's keys and values.

Both make the weights again from what the forward kept of each row. The rows' own keys and values, W a row, are XLA's.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.anchored_attention import walk_gpu as walk
from pallas_kernels.anchored_attention.context_gpu import of_context
from pallas_kernels.anchored_attention.reference import block_mask

TILE = 64  # keys of one product: two tiles of scores and the sums fit the registers


def backward(
    options: walk.Options,
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
    dk, dv = of_context(options, q, ctx_k, ctx_v, first, end, do, lse, mean)
    return dq, dk, dv, *_of_own(options, q, own_k, own_v, do, lse, mean)


def _of_queries(options: walk.Options, q, ctx_k, ctx_v, own_k, own_v, first, end, do, lse, mean) -> Array:
    B, R, N, H = q.shape
    steps = R // walk.STEP
    body = functools.partial(_kernel, options=options, steps=steps, group=N // ctx_k.shape[2])
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(N, steps, B),
        grid_names=("head", "step", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            hopper.swizzled((2, walk.ROWS, H), q.dtype),
            hopper.swizzled((2, walk.ROWS, H), q.dtype),
            walk.Ring.types(TILE, H, q.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(first, end, walk.step_tiles(first, end, TILE), q, ctx_k, ctx_v, own_k, own_v, do, lse, mean)


def _kernel(
    first, end, limits, q, ctx_k, ctx_v, own_k, own_v, do, lse, mean, dq, q_smem, do_smem, ring, ready,
    *, options: walk.Options, steps: int, group: int,
) -> None:  # fmt: skip
    wg, place = jax.lax.axis_index("warpgroup"), walk.Place.here(limits, steps, group)

    @pl.when(wg < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        here, mine, given = pl.ds(place.step * walk.STEP + wg * walk.ROWS, walk.ROWS), q_smem.at[wg], do_smem.at[wg]
        plgpu.copy_gmem_to_smem(q.at[place.b, here, place.head], mine, ready.at[wg])
        plgpu.copy_gmem_to_smem(do.at[place.b, here, place.head], given, ready.at[wg])
        total, average = (hopper.load(ref.at[place.b, place.head, here], walk.BY_ROW) for ref in (lse, mean))
        seen = tuple(hopper.load(ref.at[place.b, here], walk.BY_ROW) for ref in (first, end))
        plgpu.barrier_wait(ready.at[wg])

        def absorb(slot: Array, acc: Array, masked: Callable) -> Array:
            keys, values = ring.k.at[slot], ring.v.at[slot]
            plgpu.barrier_wait(ring.k_ready.at[slot])
            scores = hopper.product(mine, keys) * (options.scale * walk.LOG2_E)
            weights = masked(jnp.exp2(scores - walk.along(total, scores.shape)), 0.0)
            plgpu.barrier_wait(ring.v_ready.at[slot])
            of_weights = hopper.product(given, values)
            plgpu.barrier_arrive(ring.v_free.at[slot])
            of_scores = weights * (of_weights - walk.along(average, scores.shape))
            acc = hopper.plus_product(acc, of_scores.astype(mine.dtype), keys)
            plgpu.barrier_arrive(ring.k_free.at[slot])
            return acc

        acc = walk.over_tiles(options, TILE, wg, place, seen, absorb, walk.zeros(walk.ROWS, mine.shape[1]))
        mine[...] = (acc * options.scale).astype(mine.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, dq.at[place.b, here, place.head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
        walk.copy_tiles(TILE, place, (own_k, own_v), (ctx_k, ctx_v), ring)


def _of_own(options: walk.Options, q, own_k, own_v, do, lse, mean) -> tuple[Array, ...]:
    """Of the blocks' own keys and values."""
    B, _, N, H = q.shape
    K, W = own_k.shape[2], options.rows
    q, do = (x.reshape(B, -1, W, K, N // K, H) for x in (q, do))
    keys, values = (x.reshape(B, -1, W, K, H) for x in (own_k, own_v))
    lse, mean = (x.reshape(B, K, N // K, -1, W, 1) for x in (lse, mean))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    seen = block_mask(W, options.causal, options.window) & (jnp.arange(W) < options.real_rows)
    scores = product("bawkgh,bavkh->bkgawv", q, keys) * (options.scale * walk.LOG2_E)
    weights = jnp.where(seen, jnp.exp2(scores - lse), 0.0)
    of_scores = weights * (product("bawkgh,bavkh->bkgawv", do, values) - mean) * options.scale
    dk = product("bkgawv,bawkgh->bavkh", of_scores.astype(q.dtype), q)
    dv = product("bkgawv,bawkgh->bavkh", weights.astype(q.dtype), do)
    return tuple(x.reshape(own_k.shape).astype(q.dtype) for x in (dk, dv))
