"""The block's rows into their pages, in place.

Memory holds rows in tiles (8 rows of 4 bytes, 16 of 2), and a copy moves whole tiles. So the block is laid out in VMEM
as it will lie in memory: the committed rows that share its first tile are written back as they were (they are in VMEM,
being the last of the context), and what follows it in its last tile is not committed and becomes zeros. Each tile lies
in one page.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_attention.plan import Plan

PageOf = Callable[[Plan, Any, Any, Any], tuple[Any, Any]]


def offset_of(plan: Plan, unit: Any) -> Any:
    """Committed rows in the memory tile where the block begins."""
    return jax.lax.rem(unit.length, plan.sublanes)


def exists(plan: Plan, page: Any, row: Any) -> Any:
    """Whether a sequence has room for a row."""
    return (row < plan.capacity) & (page >= 0)


def writes(plan: Plan, r: SimpleNamespace, unit: Any, page_of: PageOf) -> Iterator[tuple[Any, list[Any]]]:
    """The copies of the staged tiles into the caches, each with whether it is needed."""
    start = unit.length - offset_of(plan, unit)
    for i in range(plan.stage // plan.sublanes):
        tile = start + i * plan.sublanes
        page, row = page_of(plan, r.table, unit.sequence, tile)
        copies = [
            pltpu.make_async_copy(
                r.stage.at[j, :, pl.ds(i * plan.sublanes, plan.sublanes)],
                cache.at[page, pl.ds(unit.head, plan.heads), pl.ds(row, plan.sublanes)],
                r.kept.at[j],
            )
            for j, cache in enumerate((r.keys, r.values))
        ]
        yield (tile < unit.length + plan.width) & exists(plan, page, tile), copies


def keep_rows(
    plan: Plan, r: SimpleNamespace, unit: Any, slot: Any, tail: Any, page_of: PageOf, unit_at: Callable[[Any], Any]
) -> None:
    """Write the block; `slot` holds the context's last tile. Copies end in the next unit, those of the last here."""
    step = pl.program_id(1)

    def wait(unit: Any) -> None:
        for needed, copies in writes(plan, r, unit, page_of):
            for copy in copies:
                pl.when(needed)(copy.wait)

    @pl.when(tail)
    def _() -> None:
        pl.when(step > 0)(lambda: wait(unit_at(jnp.maximum(step - 1, 0))))
        _stage(plan, r, unit, slot)
        for needed, copies in writes(plan, r, unit, page_of):
            for copy in copies:
                pl.when(needed)(copy.start)
        pl.when(step == plan.steps - 1)(lambda: wait(unit))


def _stage(plan: Plan, r: SimpleNamespace, unit: Any, slot: Any) -> None:
    """Lay the block out behind the committed rows of the memory tile where it begins."""
    offset = offset_of(plan, unit)
    inside = unit.length - offset - unit.first - (unit.end - 1) * plan.tile
    inside = pl.multiple_of(jnp.where(offset > 0, inside, 0), plan.sublanes)
    committed = jax.lax.broadcasted_iota(jnp.int32, (plan.sublanes, plan.head_dim), 0) < offset
    for j, (own, tiles) in enumerate(((r.own_keys, r.key_tiles), (r.own_values, r.value_tiles))):
        for head in range(plan.heads):
            # Rows are turned in fp32: there a row has words of its own.
            r.turned[...] = jnp.zeros_like(r.turned)
            r.turned[: plan.width] = own[head].astype(jnp.float32)
            rows = pltpu.roll(r.turned[...], offset, 0)
            before = tiles[slot, head, pl.ds(inside, plan.sublanes)].astype(jnp.float32)
            first = jnp.where(committed, before, rows[: plan.sublanes])
            r.stage[j, head, : plan.sublanes] = first.astype(r.stage.dtype)
            r.stage[j, head, plan.sublanes :] = rows[plan.sublanes :].astype(r.stage.dtype)
