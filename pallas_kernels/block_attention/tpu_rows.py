"""The block's rows into their pages, in place.

Memory holds rows in tiles (8 rows of 4 bytes, 16 of 2), and a copy moves whole tiles. So the block is laid out in VMEM
as it will lie in memory: the committed rows that share its first tile are read and written back as they were, and what
follows it in its last tile is not committed and becomes zeros. Each tile lies in one page.
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


def before(plan: Plan, r: SimpleNamespace, unit: Any, page_of: PageOf) -> tuple[Any, list[Any]]:
    """The copies of the tile where the block begins, and whether it holds committed rows."""
    offset = offset_of(plan, unit)
    start = unit.length - offset
    page, row = page_of(plan, r.table, unit.sequence, start)
    copies = [
        pltpu.make_async_copy(
            cache.at[page, pl.ds(unit.head, plan.heads), pl.ds(row, plan.sublanes)], r.before.at[j], r.fetched.at[j]
        )
        for j, cache in enumerate((r.keys, r.values))
    ]
    return (offset > 0) & exists(plan, page, start), copies


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


def prepare_rows(plan: Plan, r: SimpleNamespace, unit: Any, tail: Any, page_of: PageOf) -> None:
    """Start to read the tile where the block begins."""
    needed, copies = before(plan, r, unit, page_of)

    @pl.when(tail & needed)
    def _() -> None:
        for copy in copies:
            copy.start()


def keep_rows(
    plan: Plan, r: SimpleNamespace, unit: Any, tail: Any, page_of: PageOf, unit_at: Callable[[Any], Any]
) -> None:
    """Write the block. Its copies end during the next unit, the last one's here."""
    step = pl.program_id(1)

    def wait(unit: Any) -> None:
        for needed, copies in writes(plan, r, unit, page_of):
            for copy in copies:
                pl.when(needed)(copy.wait)

    @pl.when(tail)
    def _() -> None:
        pl.when(step > 0)(lambda: wait(unit_at(jnp.maximum(step - 1, 0))))
        needed, copies = before(plan, r, unit, page_of)
        for copy in copies:
            pl.when(needed)(copy.wait)
        _stage(plan, r, offset_of(plan, unit))
        for needed, copies in writes(plan, r, unit, page_of):
            for copy in copies:
                pl.when(needed)(copy.start)
        pl.when(step == plan.steps - 1)(lambda: wait(unit))


def _stage(plan: Plan, r: SimpleNamespace, offset: Any) -> None:
    """Lay the block out behind `offset` rows of the tile where it begins."""
    committed = jax.lax.broadcasted_iota(jnp.int32, (plan.sublanes, plan.head_dim), 0) < offset
    for j, own in enumerate((r.own_keys, r.own_values)):
        for head in range(plan.heads):
            # Rows are turned in fp32: there a row has words of its own.
            rows = own[head].astype(jnp.float32)
            rows = jnp.concatenate([rows, jnp.zeros((plan.sublanes, plan.head_dim), jnp.float32)], 0)
            rows = pltpu.roll(rows, offset, 0)
            head_tile = jnp.where(committed, r.before[j, head].astype(jnp.float32), rows[: plan.sublanes])
            r.stage[j, head, : plan.sublanes] = head_tile.astype(r.stage.dtype)
            r.stage[j, head, plan.sublanes :] = rows[plan.sublanes :].astype(r.stage.dtype)
