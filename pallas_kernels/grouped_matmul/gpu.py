"""Hopper GPUs (Mosaic GPU): a program takes up to 64 rows of one group and 128 columns of its kernel.

Groups are laid out anew, each from a multiple of 8 rows on, which is what TMA can address. Only kernels of groups that
have rows are read. One warpgroup a program: TMA brings chunks of rows and kernel into a ring of buffers for WGMMA.
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
STEP = 8  # rows that begin together


@dataclass(frozen=True)
class Shape:
    """One call of the kernel."""

    tiles: int  # at most: of 64 rows
    slots: int  # for rows, laid out anew
    inputs: int
    outputs: int
    pairs: int  # kernels of a group


def takes(rows: Any, kernels: Any) -> bool:
    """Whether the kernel does this call: bfloat16 in whole blocks of swizzled memory."""
    half = rows.dtype == kernels.dtype == jnp.bfloat16
    return half and kernels.shape[-2] % CHUNK == 0 and kernels.shape[-1] % 64 == 0


@jax.custom_vjp
def grouped(
    rows: Float[Array, "R D"], kernels: Float[Array, "E P D F"], sizes: Int[Array, "E"]
) -> Float[Array, "R P F"]:
    """Rows of each group times each of its P kernels; rows beyond the last group hold anything."""
    (R, D), (E, P, _, F) = rows.shape, kernels.shape
    s = Shape(min(E, R) + R // ROWS, -(-(R + (STEP - 1) * min(E, R)) // STEP) * STEP + ROWS, D, F, P)
    slots, table = _layout(s, sizes, R)
    source = jnp.zeros(s.slots, jnp.int32).at[slots].set(jnp.arange(R, dtype=jnp.int32))
    out = _call(s, table, rows[source], kernels.reshape(E * P, D, F))
    return out[:, slots].swapaxes(0, 1)


def _forward(rows: Array, kernels: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped(rows, kernels, sizes), (rows, kernels, sizes)


def _backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, None]:
    rows, kernels, sizes = saved

    def plain(rows: Array, kernels: Array) -> Array:
        return jnp.stack([jax.lax.ragged_dot(rows, kernels[:, p], sizes) for p in range(kernels.shape[1])], 1)

    return *jax.vjp(plain, rows, kernels)[1](gradient), None


grouped.defvjp(_forward, _backward)


def _layout(s: Shape, sizes: Int[Array, "E"], rows: int) -> tuple[Int[Array, "R"], Int[Array, "3 T"]]:
    """Where each row goes, and of each tile its group, its first slot, and how many slots it fills (0: no tile)."""
    sizes = sizes.astype(jnp.int32)
    room = -(-sizes // STEP) * STEP
    ends, places = jnp.cumsum(sizes), jnp.cumsum(room) - room
    row = jnp.arange(rows, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(ends <= row[:, None], 1), len(sizes) - 1)
    slots = jnp.minimum(row - (ends - sizes)[group] + places[group], s.slots - 1)
    counts = -(-sizes // ROWS)
    tile_ends = jnp.cumsum(counts)
    tile = jnp.arange(s.tiles, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(tile_ends <= tile[:, None], 1), len(sizes) - 1)
    before = ROWS * (tile - (tile_ends - counts)[group])
    filled = jnp.where(tile < tile_ends[-1], jnp.minimum(room[group] - before, ROWS), 0)
    return slots, jnp.stack([group, places[group] + before, filled]).astype(jnp.int32)


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
