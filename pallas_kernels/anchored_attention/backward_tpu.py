"""Backward on a TPU, in one pass: a KV head's context and the fp32 sums of its gradients stay in VMEM."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.anchored_attention.folding import context_mask, dot, fold, only, own_mask, reach, unfold
from pallas_kernels.anchored_attention.forward_tpu import Options, Step, step_bounds
from pallas_kernels.anchored_attention.plan import Plan
from pallas_kernels.anchored_attention.reference import HIDDEN


def _write_sums(sums, targets, stage, sems, plan: Plan, at, scales) -> None:
    """Copy the fp32 sums [span, lanes] to HBM in the gradients' dtype, through two small buffers each."""
    b, k, span = at
    piece = stage.shape[2]
    # One group has all lanes, which may be 64: an offset in them would have to be a multiple of 128.
    lanes = slice(None) if plan.groups == 1 else pl.ds(pl.multiple_of(k * plan.lanes, plan.lanes), plan.lanes)

    def copy(which: int, i: jax.Array) -> Any:
        positions = pl.ds(pl.multiple_of(span * plan.back_span + i * piece, piece), piece)
        slot = jax.lax.rem(i, 2)
        return pltpu.make_async_copy(
            stage.at[which, slot], targets[which].at[b, positions, lanes], sems.at[which, slot]
        )

    def write(i: jax.Array, _: None) -> None:
        for which in range(2):
            pl.when(i >= 2)(lambda which=which: copy(which, i - 2).wait())
            rows = sums[which][pl.ds(pl.multiple_of(i * piece, piece), piece), :]
            stage[which, jax.lax.rem(i, 2)] = (rows * scales[which]).astype(stage.dtype)
            copy(which, i).start()

    pieces = plan.back_span // piece
    jax.lax.fori_loop(0, pieces, write, None)
    for i in range(max(0, pieces - 2), pieces):
        for which in range(2):
            copy(which, jnp.int32(i)).wait()


def _kernel(
    anchors, starts, limits, q_ref, do_ref, out_ref, lse, k_ref, v_ref, blk_k, blk_v,
    dq, dblk_k, dblk_v, dk_hbm, dv_hbm,
    q, do, delta, dq_sum, dk_sum, dv_sum, stage, sems, *, options: Options,
):  # fmt: skip
    plan, window, tile = options.plan, options.window, options.plan.tile_context
    b, k, span, step = (pl.program_id(i) for i in range(4))
    now = Step.of(anchors, starts, limits, plan, b, step)

    @pl.when(step == 0)
    def _begin():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    q[...] = fold(q_ref[...], plan)
    do[...] = fold(do_ref[...], plan)
    product = do[...].astype(jnp.float32) * fold(out_ref[...], plan).astype(jnp.float32)
    delta[...] = product.T.sum(0, keepdims=True)
    dq_sum[...] = jnp.zeros_like(dq_sum)

    def gradients(keys: jax.Array, values: jax.Array, seen: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Of the keys (unscaled) and the values, in fp32; adds what these keys give to dq."""
        scores = dot(keys, q[...], (1, 1)) * options.scale  # [keys, rows]
        scores = scores if seen is None else jnp.where(seen, scores, HIDDEN)
        weights = jnp.exp(scores - lse[...])
        dscores = (weights * (dot(values, do[...], (1, 1)) - delta[...])).astype(q.dtype)
        dq_sum[...] += dot(keys, dscores, (0, 0))
        return dot(dscores, q[...], (1, 0)), dot(weights.astype(q.dtype), do[...], (1, 0))

    @pl.when(span == 0)
    def _own_block():
        dkeys, dvalues = gradients(blk_k[...], blk_v[...], own_mask(plan, options.causal, window))
        dblk_k[...] = (dkeys * options.scale).astype(dblk_k.dtype)
        dblk_v[...] = dvalues.astype(dblk_v.dtype)

    def add(i: jax.Array, masked: bool) -> None:
        at = pl.ds(pl.multiple_of(i * tile, tile), tile)
        keys, values, seen = k_ref[at, :], v_ref[at, :], None
        if masked:
            start = span * plan.back_span + i * tile
            seen = context_mask(start, plan, *reach(now.anchors, now.starts, plan, window))
            keys, values = only(keys, seen), only(values, seen)
        dkeys, dvalues = gradients(keys, values, seen)
        dk_sum[at, :] += dkeys
        dv_sum[at, :] += dvalues

    now.each_tile(
        span, plan.back_span // tile, functools.partial(add, masked=True), functools.partial(add, masked=False)
    )
    dq[...] = unfold((dq_sum[...] * options.scale).T.astype(dq.dtype), plan)

    @pl.when(step == plan.steps - 1)
    def _finish():
        _write_sums((dk_sum, dv_sum), (dk_hbm, dv_hbm), stage, sems, plan, (b, k, span), (options.scale, 1.0))


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers
def backward(
    options: Options,
    q: Float[Array, "B AW NH"],
    ctx_k: Float[Array, "B T KH"],
    ctx_v: Float[Array, "B T KH"],
    blk_k: Float[Array, "B AW KH"],
    blk_v: Float[Array, "B AW KH"],
    anchors: Int[Array, "B A"],
    starts: Int[Array, "B A"],
    out: Float[Array, "B AW NH"],
    lse: Float[Array, "B K 1 R"],
    do: Float[Array, "B AW NH"],
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients of the five inputs, in their order and dtypes."""
    plan, width = options.plan, options.plan.heads * options.plan.head
    spans = plan.back_spans

    def own_at(b, k, span, step, *_):  # written in the first span; stays at its last block after it
        return b, jnp.where(span == 0, step, plan.steps - 1) if spans > 1 else step, k

    rows = pl.BlockSpec((None, plan.own, width), lambda b, k, span, step, *_: (b, step, k))
    block = pl.BlockSpec((None, plan.own, plan.lanes), own_at)
    context = pl.BlockSpec(
        (None, plan.back_span, plan.lanes), lambda b, k, span, step, *_: (b, span, k),
        pipeline_mode=pl.Buffered(plan.back_buffers),
    )  # fmt: skip
    of_rows = pl.BlockSpec((None, None, 1, plan.folded), lambda b, k, span, step, *_: (b, k, 0, step))
    dq = pl.BlockSpec((None, None, plan.own, width), lambda b, k, span, step, *_: (span, b, step, k))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    sums = pltpu.VMEM((plan.back_span, plan.lanes), jnp.float32)
    folded = pltpu.VMEM((plan.folded, plan.lanes), q.dtype)
    flops = 5 * plan.products(options.window)
    partial, dblk_k, dblk_v, dk, dv = pl.pallas_call(
        functools.partial(_kernel, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(plan.batch, plan.groups, spans, plan.steps),
            in_specs=[rows, rows, rows, of_rows, context, context, block, block],
            out_specs=[dq, block, block, hbm, hbm],
            scratch_shapes=[
                folded, folded, pltpu.VMEM((1, plan.folded), jnp.float32),
                pltpu.VMEM((plan.lanes, plan.folded), jnp.float32), sums, sums,
                pltpu.VMEM((2, 2, plan.tile_context, plan.lanes), q.dtype), pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((spans, *q.shape), q.dtype if spans == 1 else jnp.float32),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (blk_k, blk_v, ctx_k, ctx_v)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=plan.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, bytes_accessed=plan.backward_bytes(), transcendentals=flops // (10 * plan.lanes)
        ),
        interpret=options.interpret,
        name="anchored_attention_backward",
    )(anchors, starts, step_bounds(anchors, starts, options), q, do, out, lse, ctx_k, ctx_v, blk_k, blk_v)  # fmt: skip
    whole = partial[0] if spans == 1 else partial.sum(0).astype(q.dtype)
    return whole, dk, dv, dblk_k, dblk_v
