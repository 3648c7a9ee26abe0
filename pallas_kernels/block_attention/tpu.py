"""Block attention on TPU: Mosaic, by `pl.pallas_call`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
    W, most = q.shape[1], longest_block(q.shape[2] // keys.shape[1], q.shape[3])
    run = partial(_block, kind=kind, **options)
    if most >= W:
        return run(q, keys, values, block_keys, block_values, lengths, page_table, mask, depths, sinks)

    def part(keys: Array, values: Array, i: Any, rows: int) -> tuple[Array, Array, Array]:
        own = (jax.lax.dynamic_slice_in_dim(x, i, rows, axis=1) for x in (q, block_keys, block_values))
        some, block_keys_, block_values_ = own
        return run(some, keys, values, block_keys_, block_values_, lengths + i, page_table, None, None, sinks)

    def step(caches: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        out, keys, values = part(*caches, i, most)
        return (keys, values), out

    (keys, values), outs = jax.lax.scan(step, (keys, values), jnp.arange(W // most) * most)
    parts = [jnp.moveaxis(outs, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])]
    if W % most:
        out, keys, values = part(keys, values, W // most * most, W % most)
        parts.append(out)
    return jnp.concatenate(parts, 1), keys, values


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
    plan = make_plan(q, keys, page_table, tree=mask is not None, sinks=sinks is not None, kind=kind, **options)
    B, W, K, G, H, R = plan.batch, plan.width, plan.kv_heads, plan.group, plan.head_dim, plan.rows
    folded = q.reshape(B, W, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, W * G, H)
    table = jnp.zeros(1, jnp.int32) if page_table is None else page_table.reshape(-1).astype(jnp.int32)
    inputs = {
        "lengths": lengths.astype(jnp.int32),
        "table": table,
        "q": _pad(folded, R),
        "own_keys": _pad(block_keys.swapaxes(1, 2).astype(keys.dtype), plan.own),
        "own_values": _pad(block_values.swapaxes(1, 2).astype(keys.dtype), plan.own),
    }
    if mask is not None:
        inputs["tree"] = _tree(plan, mask, depths)
    if sinks is not None:
        by_head = sinks.astype(jnp.float32).reshape(K // plan.heads, plan.heads, G)
        inputs["sinks"] = jnp.pad(by_head, ((0, 0), (0, 0), (0, LANES - G)))
    out, *rest = call(plan, {**inputs, "keys": keys, "values": values})
    if plan.splits > 1:
        out = _merge(out, rest.pop(0)).astype(q.dtype)
    out = out[:, :, : W * G].reshape(B, K, W, G, H).transpose(0, 2, 1, 3, 4).reshape(q.shape)
    if plan.write:
        keys, values = rest
    return out, keys, values


def _pad(x: Array, rows: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, 0)))


def _tree(plan: Plan, mask: Array, depths: Array | None) -> Array:
    """Mask and depths as numbers [B or 1, own, lanes], the window of the rows among themselves in the mask."""
    depths = jnp.arange(plan.width)[None] if depths is None else depths
    seen = own_mask(plan.width, plan.causal, plan.window, mask, depths)
    batch, more = max(seen.shape[0], depths.shape[0]), plan.own - plan.width
    tree = jnp.zeros((batch, plan.own, plan.tree_lanes), jnp.float32)
    tree = tree.at[:, : plan.width, : plan.width].set(seen)
    return tree.at[:, :, plan.own].set(jnp.pad(depths, ((0, 0), (0, more))))


def _merge(out: Array, stats: Array) -> Array:
    """Parts [splits B K R H] of a softmax, unnormalised, with their maxima and sums."""
    top, total = stats[..., 0], stats[..., 1]
    share = jnp.exp(top - jnp.max(top, 0))
    return jnp.sum(out * share[..., None], 0) / jnp.sum(total * share, 0)[..., None]


def call(plan: Plan, inputs: dict[str, Array]) -> list[Array]:
    """The kernel on laid-out inputs: output (and statistics if split), and the caches if written."""
    (B, K, R, H), heads = inputs["q"].shape, plan.heads
    dtype, groups = inputs["keys"].dtype, plan.kv_heads // heads

    def at(core: Any, step: Any, *_: Any) -> tuple[Any, Any]:
        unit = step if plan.splits > 1 else core * plan.steps + step
        return jax.lax.div(unit, groups), jax.lax.rem(unit, groups)

    def unit(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, heads, rows, H), lambda *i: (*at(*i), 0, 0))

    specs = {"q": unit(R), "own_keys": unit(plan.own), "own_values": unit(plan.own)}
    if plan.tree:
        shared = inputs["tree"].shape[0] == 1
        specs["tree"] = pl.BlockSpec(
            (None, *inputs["tree"].shape[1:]), lambda *i: (0 if shared else at(*i)[0], 0, 0)
        )  # fmt: skip
    if plan.sinks:
        specs["sinks"] = pl.BlockSpec((None, heads, LANES), lambda *i: (at(*i)[1], 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    read = ["keys", "values"] if not plan.write else ["keys_given", "values_given"]
    outs = {"out": (jax.ShapeDtypeStruct((B, K, R, H), dtype), unit(R))}
    if plan.splits > 1:
        for name, lanes in (("out", H), ("stats", LANES)):
            spec = pl.BlockSpec((None, None, heads, R, lanes), lambda *i: (i[0], *at(*i), 0, 0))
            outs[name] = jax.ShapeDtypeStruct((plan.splits, B, K, R, lanes), jnp.float32), spec
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
    if plan.write:
        shapes |= {
            "stage": pltpu.VMEM((2, heads, plan.stage, H), dtype),
            "before": pltpu.VMEM((2, heads, plan.sublanes, H), dtype),
            "fetched": pltpu.SemaphoreType.DMA((2,)),
            "kept": pltpu.SemaphoreType.DMA((2,)),
        }
    return shapes
