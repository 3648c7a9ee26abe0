"""Block attention on TPU: Mosaic, by `pl.pallas_call`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_attention.parts import in_parts
from pallas_kernels.block_attention.plan import LANES, Plan, longest_block, make_plan
from pallas_kernels.block_attention.reference import own_mask
from pallas_kernels.block_attention.tpu_kernel import body

Array = jax.Array
VMEM_LIMIT = 48 * 2**20  # of 64 MiB on tpu7x, the least


def attend(
    q: Array,
    keys: Array,
    values: Array,
    block_keys: Array,
    block_values: Array,
    lengths: Array,
    page_table: Array | None,
    mask: Array | None,
    depths: Array | None,
    sinks: Array | None,
    *,
    kind: str | None = None,
    **options: Any,
) -> tuple[Array, Array, Array]:
    """What `reference.attend` computes; a long causal block in parts, each committed before the next."""
    most = longest_block(q.shape[2] // keys.shape[1], keys.shape[3])
    run = partial(_block, kind=kind, **options)
    given = q, keys, values, block_keys, block_values, lengths, page_table
    if q.shape[1] <= most:
        return run(*given, mask, depths, sinks)
    return in_parts(run, most, *given, None, None, sinks)


def _block(
    q: Array,
    keys: Array,
    values: Array,
    block_keys: Array,
    block_values: Array,
    lengths: Array,
    page_table: Array | None,
    mask: Array | None,
    depths: Array | None,
    sinks: Array | None,
    *,
    kind: str | None,
    **options: Any,
) -> tuple[Array, Array, Array]:
    masks = 0 if mask is None else max(mask.shape[0], 1 if depths is None else depths.shape[0])
    plan = make_plan(q, keys, page_table, masks=masks, sinks=sinks is not None, kind=kind, **options)
    B, W, K, p, G, L = plan.batch, plan.width, plan.kv_heads, plan.packed, plan.group, plan.head_dim
    table = jnp.zeros(1, jnp.int32) if page_table is None else page_table.reshape(-1).astype(jnp.int32)
    inputs = {
        "lengths": lengths.astype(jnp.int32),
        "table": table,
        "q": q.reshape(B, W, K, p, G, -1).transpose(0, 2, 1, 4, 3, 5).reshape(B, K, W * G, L),
        "own_keys": block_keys.reshape(B, W, K, L).swapaxes(1, 2).astype(keys.dtype),
        "own_values": block_values.reshape(B, W, K, L).swapaxes(1, 2).astype(keys.dtype),
    }
    if mask is not None:
        inputs["tree"] = _tree(plan, mask, depths)
    if sinks is not None:
        by_head = sinks.astype(jnp.float32).reshape(K // plan.heads, plan.heads, p * G)
        inputs["sinks"] = jnp.pad(by_head, ((0, 0), (0, 0), (0, LANES - p * G)))
    out, *rest = call(plan, {**inputs, "keys": keys, "values": values})
    if plan.splits > 1:
        out = _merge(plan, out, rest.pop(0)).astype(q.dtype)
    out = out.reshape(B, K, W, G, p, -1).transpose(0, 2, 1, 4, 3, 5).reshape(q.shape)
    if plan.write:
        keys, values = rest
    return out, keys, values


def _tree(plan: Plan, mask: Array, depths: Array | None) -> Array:
    """Mask and depths as numbers [1 or B, W, lanes], the window of the rows among themselves in the mask."""
    depths = jnp.arange(plan.width)[None] if depths is None else depths
    seen = own_mask(plan.width, plan.causal, plan.window, mask, depths)
    tree = jnp.zeros((plan.masks, plan.width, plan.tree_lanes), jnp.float32)
    return tree.at[:, :, : plan.width].set(seen).at[:, :, plan.width].set(depths)


def _merge(plan: Plan, out: Array, stats: Array) -> Array:
    """Parts [splits B K W*G L] of a softmax, unnormalised, with the maxima and sums of their rows."""
    top, total = (stats[..., i].reshape(*out.shape[:3], plan.packed, plan.queries) for i in range(2))
    share = jnp.exp(top - jnp.max(top, 0))
    share = share / jnp.sum(total * share, 0)
    lanes = jnp.repeat(jnp.moveaxis(share, 3, 4), plan.head_dim // plan.packed, axis=4)  # [splits B K W*G L]
    return jnp.sum(out * lanes, 0)


def call(plan: Plan, inputs: dict[str, Array]) -> list[Array]:
    """The kernel on laid-out inputs: output (and statistics if split), and the caches if written."""
    (B, K, queries, L), heads = inputs["q"].shape, plan.heads
    dtype, groups = inputs["keys"].dtype, plan.kv_heads // heads

    def at(core: Any, step: Any, *_: Any) -> tuple[Any, Any]:
        unit = step if plan.splits > 1 else core * plan.steps + step
        return jax.lax.div(unit, groups), jax.lax.rem(unit, groups)

    def unit(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, heads, rows, L), lambda *i: (*at(*i), 0, 0))

    specs = {"q": unit(queries), "own_keys": unit(plan.width), "own_values": unit(plan.width)}
    if plan.masks:
        specs["tree"] = pl.BlockSpec(
            (None, plan.width, plan.tree_lanes), lambda *i: (at(*i)[0] if plan.masks > 1 else 0, 0, 0)
        )
    if plan.sinks:
        specs["sinks"] = pl.BlockSpec((None, heads, LANES), lambda *i: (at(*i)[1], 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    read = ["keys", "values"] if not plan.write else ["keys_given", "values_given"]
    outs = {"out": (jax.ShapeDtypeStruct((B, K, queries, L), dtype), unit(queries))}
    if plan.splits > 1:
        for name, rows, lanes in (("out", queries, L), ("stats", plan.rows, LANES)):
            spec = pl.BlockSpec((None, None, heads, rows, lanes), lambda *i: (i[0], *at(*i), 0, 0))
            outs[name] = jax.ShapeDtypeStruct((plan.splits, B, K, rows, lanes), jnp.float32), spec
    if plan.write:
        outs |= {name: (jax.ShapeDtypeStruct(inputs[name].shape, dtype), anywhere) for name in ("keys", "values")}
    scratch = _scratch(plan, dtype)
    names = ["lengths", "table", *specs, *read, *outs, *scratch]
    arguments = [inputs[name] for name in ("lengths", "table", *specs, "keys", "values")]
    written = {len(arguments) - 2: len(outs) - 2, len(arguments) - 1: len(outs) - 1}
    return pl.pallas_call(
        partial(body, plan, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(plan.cores, plan.steps),
            in_specs=[*specs.values(), anywhere, anywhere],
            out_specs=[spec for _, spec in outs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outs.values()],
        input_output_aliases=written if plan.write else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * plan.head_dim * plan.scores(plan.full),
            transcendentals=plan.scores(plan.full),
            bytes_accessed=plan.bytes_moved(plan.full),
        ),
        name=f"block_attention_{plan.width}",
    )(*arguments)


def _scratch(plan: Plan, dtype: Any) -> dict[str, Any]:
    heads, R, H = plan.heads, plan.rows, plan.head_dim
    shapes = {
        "key_tiles": pltpu.VMEM((2, heads, plan.tile, H), dtype),
        "value_tiles": pltpu.VMEM((2, heads, plan.tile, H), dtype),
        "arrived": pltpu.SemaphoreType.DMA((2, 2)),
        "slot": pltpu.SMEM((1,), jnp.int32),
        "acc": pltpu.VMEM((heads, R, H), jnp.float32),
        "top": pltpu.VMEM((heads, R, 1), jnp.float32),
        "total": pltpu.VMEM((heads, R, 1), jnp.float32),
        "depth": pltpu.VMEM((R, 1), jnp.int32),
    }
    if plan.packed > 1:
        shapes["apart"] = pltpu.VMEM((heads, R, H), jnp.float32)
    if plan.write:
        shapes |= {
            "turned": pltpu.VMEM((plan.stage, H), jnp.float32),
            "stage": pltpu.VMEM((2, heads, plan.stage, H), dtype),
            "kept": pltpu.SemaphoreType.DMA((2,)),
        }
    return shapes
