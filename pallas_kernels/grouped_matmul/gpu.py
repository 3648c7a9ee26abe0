"""Hopper GPUs (Mosaic GPU): a program takes up to 64 rows of one group and 128 columns of its kernel.

Rows lie in slots, group after group, each from a multiple of 8 on, which is what TMA can address. Only kernels of
groups that have rows are read. One warpgroup a program: TMA brings chunks of rows and kernel into a ring of buffers
for WGMMA.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper

ROWS, COLUMNS, CHUNK = 64, 128, 64  # rows of a group, columns and inputs of its kernel that a product takes
BUFFERS = 4  # 96 KiB: two programs fit a multiprocessor, and 128 KiB are on their way to it
STEP = 8  # slots that a group takes at a time
FEW = 1024  # rows that are compared with each other quicker than they are sorted


def takes(rows: Any, kernels: Any) -> bool:
    """Whether the kernel does this product: bfloat16 in whole blocks of swizzled memory."""
    half = rows.dtype == kernels.dtype == jnp.bfloat16
    return half and kernels.shape[-2] % CHUNK == 0 and kernels.shape[-1] % 64 == 0


@dataclass(frozen=True)
class Slots:
    """Where R rows of E groups lie."""

    slots: Int[Array, "R"]  # of each row; rows of no group share the last one
    source: Int[Array, "S"]  # row of each slot, any one where there is none
    room: Int[Array, "E"]  # slots of each group
    table: Int[Array, "3 T"]  # group, first slot, and slots of each tile; a tile without slots is none

    @classmethod
    def of(cls, group: Int[Array, "R"], groups: int) -> "Slots":
        """For the group of each row, `groups` where it is of none."""
        R, E = len(group), groups
        count = -(-(R + (STEP - 1) * min(E, R)) // STEP) * STEP + ROWS
        sizes = jnp.sum(group[:, None] == jnp.arange(E), 0, dtype=jnp.int32)
        room = -(-sizes // STEP) * STEP
        first = jnp.cumsum(room) - room
        rank = _ranks(group, sizes)
        slots = jnp.where(group < E, first[jnp.minimum(group, E - 1)] + rank, count - 1)
        source = jnp.zeros(count, jnp.int32).at[slots].set(jnp.arange(R, dtype=jnp.int32))
        tiles = -(-sizes // ROWS)
        ends = jnp.cumsum(tiles)
        tile = jnp.arange(min(E, R) + R // ROWS, dtype=jnp.int32)  # at most
        own = jnp.minimum(jnp.sum(ends <= tile[:, None], 1), E - 1)
        before = ROWS * (tile - (ends - tiles)[own])
        filled = jnp.where(tile < ends[-1], jnp.minimum(room[own] - before, ROWS), 0)
        table = jnp.stack([own, first[own] + before, filled]).astype(jnp.int32)
        # Without the barrier XLA works all of this out again for every number that is gathered by it.
        return cls(*jax.lax.optimization_barrier((slots, source, room, table)))

    def product(self, x: Float[Array, "S D"], kernels: Float[Array, "E P D F"]) -> Float[Array, "S P F"]:
        """Rows in their slots times each of the P kernels of their group; slots of no row hold anything."""
        return _product(x, kernels, self.table, self.room)


def _ranks(group: Int[Array, "R"], sizes: Int[Array, "E"]) -> Int[Array, "R"]:
    """How many rows of its group come before each row."""
    row = jnp.arange(len(group), dtype=jnp.int32)
    if len(group) <= FEW:
        return jnp.sum((group[:, None] == group) & (row < row[:, None]), 1, dtype=jnp.int32)
    order = jnp.argsort(group)
    place = jnp.zeros_like(row).at[order].set(row, unique_indices=True)
    return place - (jnp.cumsum(sizes) - sizes)[jnp.minimum(group, len(sizes) - 1)]


@jax.custom_vjp
def _product(x: Array, kernels: Array, table: Array, room: Array) -> Array:
    (E, P, D, F), S = kernels.shape, len(x)
    return jnp.moveaxis(_call(Shape(table.shape[1], S, D, F, P), table, x, kernels.reshape(E * P, D, F)), 0, 1)


def _forward(x: Array, kernels: Array, table: Array, room: Array) -> tuple[Array, tuple[Array, ...]]:
    return _product(x, kernels, table, room), (x, kernels, room)


def _backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, None, None]:
    x, kernels, room = saved

    def plain(x: Array, kernels: Array) -> Array:
        return jnp.stack([jax.lax.ragged_dot(x, kernels[:, p], room) for p in range(kernels.shape[1])], 1)

    return *jax.vjp(plain, x, kernels)[1](gradient), None, None


_product.defvjp(_forward, _backward)


@dataclass(frozen=True)
class Shape:
    """One call of the kernel."""

    tiles: int
    slots: int
    inputs: int
    outputs: int
    pairs: int  # kernels of a group


def _call(s: Shape, table: Array, rows: Array, kernels: Array) -> Array:
    """[P, slots, F]; slots that no row has may hold anything."""
    return plgpu.kernel(
        partial(_program, s),
        out_type=jax.ShapeDtypeStruct((s.pairs, s.slots, s.outputs), rows.dtype),
        # Neighbours read columns that lie side by side.
        grid=(-(-s.outputs // COLUMNS), s.pairs, s.tiles),
        grid_names=("column", "pair", "tile"),
        scratch_types=[
            hopper.swizzled((BUFFERS, ROWS, CHUNK)),
            hopper.swizzled((BUFFERS, CHUNK, COLUMNS)),
            hopper.swizzled((ROWS, COLUMNS)),
            plgpu.Barrier(num_arrivals=2, num_barriers=BUFFERS),
        ],
    )(table, rows, kernels)


def _program(
    s: Shape, table: Any, rows: Any, kernels: Any, out: Any, rows_ring: Any, kernel_ring: Any, out_tile: Any,
    arrived: Any,
) -> None:  # fmt: skip
    """One tile of rows and columns."""
    column, pair, tile = (jax.lax.axis_index(name) for name in ("column", "pair", "tile"))
    kernel, filled = table[0, tile] * s.pairs + pair, table[2, tile]
    first = jax.lax.div(table[1, tile], jnp.int32(STEP)) * STEP
    columns, steps = pl.ds(column * COLUMNS, COLUMNS), s.inputs // CHUNK

    def fetch(step: Any) -> None:
        slot, chunk = jax.lax.rem(step, jnp.int32(BUFFERS)), pl.ds(step * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(rows.at[pl.ds(first, ROWS), chunk], rows_ring.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(kernels.at[kernel, chunk, columns], kernel_ring.at[slot], arrived.at[slot])

    def products(acc: Any) -> Array:
        def add(step: Any, _: None) -> None:
            slot = jax.lax.rem(step, jnp.int32(BUFFERS))
            plgpu.barrier_wait(arrived.at[slot])
            hopper.add_product(acc, rows_ring.at[slot], kernel_ring.at[slot])
            # The product before is done, so its buffer may be filled again.
            pl.when(step + BUFFERS - 1 < steps)(lambda: fetch(step + BUFFERS - 1))

        jax.lax.fori_loop(0, steps, add, None)
        return acc[...]

    @pl.when(filled > 0)
    def _() -> None:
        for step in range(min(BUFFERS - 1, steps)):
            fetch(jnp.int32(step))
        out_tile[...] = hopper.accumulated(products, (ROWS, COLUMNS)).astype(out_tile.dtype)
        plgpu.commit_smem()
        for count in range(STEP, ROWS + 1, STEP):  # what follows is another group's
            here = pl.ds(0, count), pl.ds(first, count)
            pl.when(filled == count)(
                partial(plgpu.copy_smem_to_gmem, out_tile.at[here[0]], out.at[pair, here[1], columns])
            )
        plgpu.wait_smem_to_gmem(0)
