"""Forward of the drafter's training attention on a TPU: flash attention with the context of a KV head in VMEM."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.anchored_attention.bounds import bounds
from pallas_kernels.anchored_attention.folding import context_mask, dot, fold, only, own_mask, reach, unfold
from pallas_kernels.anchored_attention.plan import Plan
from pallas_kernels.anchored_attention.reference import HIDDEN


class Options(NamedTuple):
    """What is fixed when the kernels are compiled."""

    plan: Plan
    causal: bool
    window: int | None
    scale: float
    interpret: Any = False


def step_bounds(anchors: Int[Array, "B A"], starts: Int[Array, "B A"], options: Options) -> Int[Array, "4 BS"]:
    """`bounds` for the plan's steps and tiles."""
    plan = options.plan
    return bounds(
        anchors, starts, per_step=plan.tile_anchors, rows=plan.rows, tile=plan.tile_context, length=plan.real_context,
        window=options.window,
    )  # fmt: skip


class Step(NamedTuple):
    """The scalars of a grid step."""

    anchors: list[jax.Array]
    starts: list[jax.Array]
    tiles: tuple[jax.Array, ...]

    @classmethod
    def of(cls, anchors: Any, starts: Any, limits: Any, plan: Plan, b: Any, step: Any) -> "Step":
        at = b * plan.steps + step
        blocks = [step * plan.tile_anchors + i for i in range(plan.tile_anchors)]
        mine, begins = ([of[b, block] for block in blocks] for of in (anchors, starts))
        return cls(mine, begins, tuple(limits[i, at] for i in range(4)))

    def each_tile(self, span: Any, tiles_of_span: int, edge: Any, whole: Any) -> None:
        """Call `edge` or `whole` with the index in this span of each tile that some row, or every row, sees."""
        base = span * tiles_of_span
        begin, whole_begin, whole_end, end = (jnp.clip(t - base, 0, tiles_of_span) for t in self.tiles)
        for start, stop, call in ((begin, whole_begin, edge), (whole_begin, whole_end, whole), (whole_end, end, edge)):
            jax.lax.fori_loop(start, stop, lambda i, _, call=call: call(i), None)


def _kernel(
    anchors, starts, limits, q_ref, k_ref, v_ref, blk_k, blk_v, out, lse, q, top, total, acc, *, options: Options
):  # fmt: skip
    plan, window, tile = options.plan, options.window, options.plan.tile_context
    b, step, span = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    now = Step.of(anchors, starts, limits, plan, b, step)

    def absorb(keys: jax.Array, values: jax.Array, seen: jax.Array | None) -> None:
        scores = dot(keys, q[...], (1, 1)) * options.scale  # [keys, rows]
        scores = scores if seen is None else jnp.where(seen, scores, HIDDEN)
        new = jnp.maximum(top[...], scores.max(0, keepdims=True))
        weights, old = jnp.exp(scores - new), jnp.exp(top[...] - new)
        top[...] = new
        total[...] = total[...] * old + weights.sum(0, keepdims=True)
        acc[...] = acc[...] * old + dot(values, weights.astype(values.dtype), (0, 0))

    @pl.when(span == 0)
    def _own_block():  # first: every row sees itself, so that the maximum is a true score from here on
        q[...] = fold(q_ref[...], plan)
        top[...] = jnp.full_like(top, HIDDEN)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        absorb(blk_k[...], blk_v[...], own_mask(plan, options.causal, window))

    def tile_at(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = pl.ds(pl.multiple_of(i * tile, tile), tile)
        return k_ref[at, :], v_ref[at, :]

    def whole(i: jax.Array) -> None:
        absorb(*tile_at(i), None)

    def edge(i: jax.Array) -> None:
        keys, values = tile_at(i)
        start = span * plan.span + i * tile
        seen = context_mask(start, plan, *reach(now.anchors, now.starts, plan, window))
        absorb(keys, only(values, seen), seen)

    now.each_tile(span, plan.span // tile, edge, whole)

    @pl.when(span == plan.spans - 1)
    def _finish():
        out[...] = unfold((acc[...] / total[...]).T.astype(out.dtype), plan)
        lse[...] = top[...] + jnp.log(total[...])


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers
def forward(
    options: Options,
    q: Float[Array, "B AW NH"],
    ctx_k: Float[Array, "B T KH"],
    ctx_v: Float[Array, "B T KH"],
    blk_k: Float[Array, "B AW KH"],
    blk_v: Float[Array, "B AW KH"],
    anchors: Int[Array, "B A"],
    starts: Int[Array, "B A"],
) -> tuple[Float[Array, "B AW NH"], Float[Array, "B K 1 R"]]:
    """Output and log-sum-exps, these in the order of folded rows. Shapes are the plan's padded ones."""
    plan = options.plan

    def context_at(b, k, step, span, anchors, starts, limits):
        if plan.spans > 1:  # a span that the step does not need repeats another, which is not loaded again
            at, tiles = b * plan.steps + step, plan.span // plan.tile_context
            first = jnp.minimum(limits[0, at] // tiles, plan.spans - 1)
            span = jnp.clip(span, first, jnp.maximum(first, (limits[3, at] - 1) // tiles))
        return b, span, k

    rows = pl.BlockSpec((None, plan.own, plan.heads * plan.head), lambda b, k, step, *_: (b, step, k))
    block = pl.BlockSpec((None, plan.own, plan.lanes), lambda b, k, step, *_: (b, step, k))
    context = pl.BlockSpec((None, plan.span, plan.lanes), context_at, pipeline_mode=pl.Buffered(plan.buffers))
    lse = pl.BlockSpec((None, None, 1, plan.folded), lambda b, k, step, *_: (b, k, 0, step))
    vector = pltpu.VMEM((1, plan.folded), jnp.float32)
    flops = 2 * plan.products(options.window)
    return pl.pallas_call(
        functools.partial(_kernel, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(plan.batch, plan.groups, plan.steps, plan.spans),
            in_specs=[rows, context, context, block, block],
            out_specs=[rows, lse],
            scratch_shapes=[
                pltpu.VMEM((plan.folded, plan.lanes), q.dtype), vector, vector,
                pltpu.VMEM((plan.lanes, plan.folded), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((plan.batch, plan.groups, 1, plan.steps * plan.folded), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=plan.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, bytes_accessed=plan.forward_bytes(), transcendentals=flops // (4 * plan.lanes)
        ),
        interpret=options.interpret,
        name="anchored_attention_forward",
    )(anchors, starts, step_bounds(anchors, starts, options), q, ctx_k, ctx_v, blk_k, blk_v)  # fmt: skip
