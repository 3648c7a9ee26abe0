"""The body of the TPU kernel: one unit a grid step, its pages by hand in two buffers."""

from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_attention.plan import LANES, Plan
from pallas_kernels.block_attention.tpu_rows import keep_rows

HIDDEN = -1e30
Scalar = Any


class Unit(NamedTuple):
    """What a grid step works on: scalars."""

    sequence: Scalar
    head: Scalar  # the first of its KV heads
    length: Scalar
    first: Scalar  # the cache row where its first tile starts
    pieces: Scalar
    begin: Scalar  # its tiles, of this core's part
    end: Scalar


def unit_of(plan: Plan, lengths: Any, core: Scalar, step: Scalar) -> Unit:
    """The unit of a grid step."""
    groups, per_tile = plan.kv_heads // plan.heads, plan.tile // plan.piece
    index = step if plan.splits > 1 else core * plan.steps + step
    sequence, head = jax.lax.div(index, groups), jax.lax.rem(index, groups) * plan.heads
    length = lengths[sequence]
    first = length * 0
    if plan.window is not None:
        first = jax.lax.div(jnp.maximum(length - max(plan.window - 1, 1), 0), plan.piece) * plan.piece
    pieces = jax.lax.div(length - first + plan.piece - 1, plan.piece)
    begin, end = length * 0, jax.lax.div(pieces + per_tile - 1, per_tile)
    if plan.splits > 1:
        # Dealt from the end: the core that writes the block is the one that reads the memory tile it begins in.
        share = jax.lax.div(end + plan.splits - 1, plan.splits)
        begin = jnp.maximum(end - (plan.splits - core) * share, 0)
        end = jnp.maximum(end - (plan.splits - 1 - core) * share, 0)
    return Unit(sequence, head, length, first, pieces, begin, end)


def page_of(plan: Plan, table: Any, sequence: Scalar, row: Scalar) -> tuple[Scalar, Scalar]:
    """The page of a cache row, and the row in it, at a multiple of a memory tile."""
    if not plan.paged:
        return sequence, pl.multiple_of(row, plan.sublanes)
    index = jnp.minimum(jax.lax.div(row, plan.page), plan.pages - 1)
    return table[sequence * plan.pages + index], pl.multiple_of(jax.lax.rem(row, plan.page), plan.sublanes)


def transfer(
    plan: Plan, r: SimpleNamespace, unit: Unit, tile: Scalar, slot: Scalar, act: Literal["start", "wait"]
) -> None:
    """Start the copies of a tile's keys and values into a buffer, or wait for them: committed pieces only."""
    per_tile = plan.tile // plan.piece

    def copy(i: Scalar, _: None) -> None:
        page, row = page_of(plan, r.table, unit.sequence, unit.first + (tile * per_tile + i) * plan.piece)
        for j, (cache, buffer) in enumerate(((r.keys, r.key_tiles), (r.values, r.value_tiles))):
            source = cache.at[page, pl.ds(unit.head, plan.heads), pl.ds(row, plan.piece)]
            into = buffer.at[slot, :, pl.ds(pl.multiple_of(i * plan.piece, plan.sublanes), plan.piece)]
            getattr(pltpu.make_async_copy(source, into, r.arrived.at[slot, j]), act)()

    jax.lax.fori_loop(0, jnp.minimum(unit.pieces - tile * per_tile, per_tile), copy, None)


def start_first(plan: Plan, r: SimpleNamespace, core: Scalar, step: Scalar, slot: Scalar) -> None:
    """Start the copies of the first tile of a step, if there is one."""

    @pl.when(step < plan.steps)
    def _() -> None:
        unit = unit_of(plan, r.lengths, core, jnp.minimum(step, plan.steps - 1))

        @pl.when(unit.begin < unit.end)
        def _() -> None:
            transfer(plan, r, unit, unit.begin, slot, "start")


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product of two matrices over the axes given, in fp32."""
    if y.shape[0] == 1:  # plain decoding's one row; Mosaic has no product with a single row of 2-byte numbers
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.sum(x * y, 1, keepdims=True) if contract == (1, 1) else x * y
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def accumulate(
    plan: Plan, r: SimpleNamespace, head: int, keys: jax.Array, values: jax.Array, seen: jax.Array | None
) -> None:
    """One step of the softmax of a head: keys and values [T H], of which row r sees seen [R T]; None is all of them."""
    q = r.q[head] if plan.packed == 1 else r.apart[head].astype(keys.dtype)
    scores = dot(q, keys, (1, 1)) * plan.scale
    if plan.soft_cap is not None:
        scores = plan.soft_cap * jnp.tanh(scores / plan.soft_cap)
    if seen is not None:
        scores = jnp.where(seen, scores, HIDDEN)
    before = r.top[head]
    top = jnp.maximum(before, jnp.max(scores, 1, keepdims=True))
    weights, kept = jnp.exp(scores - top), jnp.exp(before - top)
    r.top[head] = top
    r.total[head] = r.total[head] * kept + jnp.sum(weights, 1, keepdims=True)
    r.acc[head] = r.acc[head] * kept + dot(weights.astype(values.dtype), values, (1, 0))


def row_places(plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The row of the block, and the query head of the KV head, that a query row stands for, [R 1] each.

    Query rows are in the order (head of the cache's row, row of the block, query head).
    """
    row = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0)
    part = sum(((row >= i * plan.queries).astype(jnp.int32) for i in range(1, plan.packed)), jnp.zeros_like(row))
    row -= part * plan.queries
    # In fp32, which has a division by any number.
    token = jnp.floor((row.astype(jnp.float32) + 0.5) * (1.0 / plan.group)).astype(jnp.int32)
    return token, part * plan.group + row - token * plan.group


def spread(plan: Plan, r: SimpleNamespace) -> None:
    """Queries of heads that lie side by side, each in rows of its own that are zero where the others' numbers lie."""
    size = plan.head_dim // plan.packed
    lane = jax.lax.broadcasted_iota(jnp.int32, (plan.queries, plan.head_dim), 1)
    for head in range(plan.heads):
        q = r.q[head].astype(jnp.float32)
        for i in range(plan.packed):
            own = (lane >= i * size) & (lane < (i + 1) * size)
            r.apart[head, i * plan.queries : (i + 1) * plan.queries] = jnp.where(own, q, 0.0)


def gathered(plan: Plan, x: jax.Array) -> jax.Array:
    """The way back: of x [R H] each head's own numbers, [W*G H]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (plan.queries, plan.head_dim), 1)
    out = x[: plan.queries]
    for i in range(1, plan.packed):
        own = lane >= i * (plan.head_dim // plan.packed)
        out = jnp.where(own, x[i * plan.queries : (i + 1) * plan.queries], out)
    return out


def own_view(plan: Plan, r: SimpleNamespace) -> tuple[jax.Array, jax.Array]:
    """What the query rows see of the block [R W], and how deep they stand in it [R 1]."""
    token, _ = row_places(plan)
    column = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, plan.width), 1)
    if plan.masks:
        # The product with a one-hot matrix repeats the mask's rows for the G heads; its numbers are small and exact.
        tree = dot((column == token).astype(jnp.float32), r.tree[...], (1, 0))
        return tree[:, : plan.width] > 0.5, (tree[:, plan.width : plan.width + 1] + 0.5).astype(jnp.int32)
    seen = column <= (token if plan.causal else plan.width)
    if plan.window is not None:
        seen &= column > token - plan.window
    return seen, token


def start_rows(plan: Plan, r: SimpleNamespace, tail: Scalar) -> None:
    """The softmax before any cached row: of the sinks and the block itself in the last part, of nothing in others."""
    r.top[...] = jnp.full_like(r.top, HIDDEN)
    r.total[...] = jnp.zeros_like(r.total)
    r.acc[...] = jnp.zeros_like(r.acc)
    if plan.packed > 1:
        spread(plan, r)
    seen, depth = own_view(plan, r)
    r.depth[...] = depth

    @pl.when(tail)
    def _() -> None:
        for head in range(plan.heads):
            if plan.sinks:
                lane = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, LANES), 1)
                mine = lane == row_places(plan)[1]
                r.top[head] = jnp.sum(jnp.where(mine, r.sinks[pl.ds(head, 1)], 0.0), 1, keepdims=True)
                r.total[head] = jnp.ones_like(r.total[head])
            accumulate(plan, r, head, r.own_keys[head], r.own_values[head], seen)


def attend_tile(plan: Plan, r: SimpleNamespace, unit: Unit, tile: Scalar, slot: Scalar) -> None:
    """The softmax goes on over a tile of cached rows."""
    start = unit.first + tile * plan.tile
    whole = start + plan.tile <= unit.length
    if plan.window is not None:
        whole &= start > unit.length + plan.width - 1 - plan.window

    @pl.when(whole)
    def _() -> None:
        for head in range(plan.heads):
            accumulate(plan, r, head, r.key_tiles[slot, head], r.value_tiles[slot, head], None)

    @pl.when(jnp.logical_not(whole))
    def _() -> None:
        column = start + jax.lax.broadcasted_iota(jnp.int32, (plan.rows, plan.tile), 1)
        seen = column < unit.length
        if plan.window is not None:
            seen &= column > unit.length + r.depth[...] - plan.window
        # What lies behind the committed rows may be anything, and nothing times NaN is NaN.
        real = start + jax.lax.broadcasted_iota(jnp.int32, (plan.tile, plan.head_dim), 0) < unit.length
        for head in range(plan.heads):
            values = r.value_tiles[slot, head]
            accumulate(plan, r, head, r.key_tiles[slot, head], jnp.where(real, values, jnp.zeros_like(values)), seen)


def finish(plan: Plan, r: SimpleNamespace) -> None:
    """The unit's output, or its part of one."""
    for head in range(plan.heads):
        if plan.splits == 1:
            r.out[head] = gathered(plan, r.acc[head] / r.total[head]).astype(r.out.dtype)
        else:
            lane = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, LANES), 1)
            r.out[head] = gathered(plan, r.acc[head])
            r.stats[head] = jnp.where(lane == 0, r.top[head], r.total[head])


def body(plan: Plan, names: list[str], *refs: Any) -> None:
    """One grid step (core, step): the softmax of a unit, while the first tile of the next unit is on its way."""
    r = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    core, step = pl.program_id(0), pl.program_id(1)
    tail = core == plan.splits - 1 if plan.splits > 1 else core >= 0
    unit = unit_of(plan, r.lengths, core, step)

    @pl.when(step == 0)
    def _() -> None:
        r.slot[0] = 0
        start_first(plan, r, core, step, 0)

    slot = r.slot[0]
    start_rows(plan, r, tail)

    def one(tile: Scalar, _: None) -> None:
        here = jax.lax.rem(slot + tile - unit.begin, 2)

        @pl.when(tile + 1 < unit.end)
        def _() -> None:
            transfer(plan, r, unit, tile + 1, 1 - here, "start")

        @pl.when(tile + 1 == unit.end)
        def _() -> None:
            start_first(plan, r, core, step + 1, 1 - here)

        transfer(plan, r, unit, tile, here, "wait")
        attend_tile(plan, r, unit, tile, here)

    @pl.when(unit.begin == unit.end)
    def _() -> None:
        start_first(plan, r, core, step + 1, slot)

    jax.lax.fori_loop(unit.begin, unit.end, one, None)
    r.slot[0] = jax.lax.rem(slot + unit.end - unit.begin, 2)
    finish(plan, r)
    if plan.write:
        # The buffer of the last tile; without tiles, the one to which the next unit's first is not being copied.
        last = jax.lax.rem(slot + unit.end - unit.begin + 1, 2)
        keep_rows(plan, r, unit, last, tail, page_of, lambda step: unit_of(plan, r.lengths, core, step))
