"""The walk of a step's rows over the keys that they see, which the forward and the queries' gradients have in common.

A thread block takes a step: 128 rows of one query head (2 warpgroups of 64 rows; whole blocks of W rows each). Its
first keys are those same 128 rows' own ones, then come the context's tiles; a third warpgroup copies both into a ring.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels import hopper
from pallas_kernels.anchored_attention.bounds import in_tiles

ROWS = 64  # of a warpgroup, the height of its matrix instruction
STEP = 2 * ROWS
STAGES = 2
WGMMA = plgpu.Layout.WGMMA
BY_ROW = WGMMA.reduce(1)
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when a program is made; `rows` of a block are a power of two, of which the first are real."""

    rows: int
    real_rows: int
    causal: bool
    window: int | None
    scale: float


class Ring(NamedTuple):
    """Buffers of keys and values, and who waits for whom."""

    k: Any
    v: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any

    @classmethod
    def types(cls, tile: int, head: int, dtype: Any) -> "Ring":
        buffers = hopper.swizzled((STAGES, tile, head), dtype)
        ready, free = plgpu.Barrier(num_barriers=STAGES), plgpu.Barrier(num_arrivals=2, num_barriers=STAGES)
        return cls(buffers, buffers, ready, ready, free, free)


class Place(NamedTuple):
    """Of a program: its sequence, its query head and that one's KV head, its step, and the step's tiles of context."""

    b: Array
    head: Array
    kv_head: Array
    step: Array
    tiles: tuple[Array, ...]  # as `in_tiles` gives them

    @classmethod
    def here(cls, limits: Any, steps: int, group: int) -> "Place":
        b, head, step = (jax.lax.axis_index(name) for name in ("batch", "head", "step"))
        return cls(
            b, head, jax.lax.div(head, jnp.int32(group)), step, tuple(limits[i, b * steps + step] for i in range(4))
        )


def step_tiles(first: Int[Array, "B R"], end: Int[Array, "B R"], tile: int) -> Int[Array, "4 BS"]:
    """`in_tiles` of every step."""
    first, end = first.reshape(-1, STEP), end.reshape(-1, STEP)
    return in_tiles(first.min(1), first.max(1), end.min(1), end.max(1), tile)


def over_tiles(
    options: Options, tile: int, wg: Any, place: Place, seen: tuple[Array, ...],
    absorb: Callable[[Array, Any, Callable], Any], carry: Any,
) -> Any:  # fmt: skip
    """`carry` after `absorb(slot of the ring, carry, masked)` of every tile: the step's own, then the context's.

    `seen` is what the warpgroup's rows see of the context; `masked(x, fill)` fills what they do not see of the tile.
    """
    own, (begin, whole_begin, whole_end, stop) = STEP // tile, place.tiles
    low, high = seen

    def places() -> tuple[Array, ...]:
        return tuple(plgpu.broadcasted_iota(jnp.int32, (ROWS, tile), axis, layout=WGMMA) for axis in (0, 1))

    def block_of(x: Array) -> Array:  # rows is a power of two
        return jax.lax.shift_right_logical(x, jnp.full_like(x, options.rows.bit_length() - 1))

    def own_mask(i: Array) -> Array:
        row, key = places()
        row, key = row + wg * ROWS, key + i * tile  # in the step
        seen = (block_of(row) == block_of(key)) & ((key & (options.rows - 1)) < options.real_rows)
        if options.causal:
            seen &= key <= row
        return seen if options.window is None else seen & (row - key < options.window)

    def context_mask(i: Array) -> Array:
        _, t = places()
        t += (begin + i - own) * tile
        return (t >= along(low, t.shape)) & (t < along(high, t.shape))

    def run(i: Array, carry: Any, mask: Callable[[Array], Array] | None) -> Any:
        def masked(x: Array, fill: float) -> Array:
            return x if mask is None else jnp.where(mask(i), x, fill)

        return absorb(jax.lax.rem(i, jnp.int32(STAGES)), carry, masked)

    done = 0
    ends = own, own + whole_begin - begin, own + whole_end - begin, own + stop - begin
    for until, mask in zip(ends, (own_mask, context_mask, None, context_mask), strict=True):
        carry = jax.lax.fori_loop(jnp.int32(done), jnp.int32(until), functools.partial(run, mask=mask), carry)
        done = until
    return carry


def copy_tiles(tile: int, place: Place, own: tuple[Any, Any], context: tuple[Any, Any], ring: Ring) -> None:
    """The keys and values that `over_tiles` absorbs, one after the other, by a warpgroup that does nothing else."""
    plgpu.set_max_registers(40, action="decrease")
    own_tiles, (begin, _, _, stop) = STEP // tile, place.tiles
    total = own_tiles + stop - begin
    parts = (own[0], context[0], ring.k, ring.k_ready, ring.k_free), (
        own[1], context[1], ring.v, ring.v_ready, ring.v_free,
    )  # fmt: skip

    def fill(i: Array, _: None) -> None:
        slot = jax.lax.rem(i, jnp.int32(STAGES))
        for own, context, smem, ready, free in parts:

            @pl.when(i >= STAGES)
            def _wait(free=free):
                plgpu.barrier_wait(free.at[slot])

            @pl.when(i < own_tiles)
            def _own(own=own, smem=smem, ready=ready):
                at = pl.ds(place.step * STEP + i * tile, tile)
                plgpu.copy_gmem_to_smem(own.at[place.b, at, place.kv_head], smem.at[slot], ready.at[slot])

            @pl.when(i >= own_tiles)
            def _context(context=context, smem=smem, ready=ready):
                at = pl.ds((begin + i - own_tiles) * tile, tile)
                plgpu.copy_gmem_to_smem(context.at[place.b, at, place.kv_head], smem.at[slot], ready.at[slot])

    jax.lax.fori_loop(jnp.int32(0), total, fill, None)
    drain(total, ring.k_free, ring.v_free)


def drain(total: Array, *free: Any) -> None:
    """Leave no barrier with a phase that was not waited for."""

    def wait(i: Array, _: None) -> None:
        for barrier in free:
            plgpu.barrier_wait(barrier.at[jax.lax.rem(i, jnp.int32(STAGES))])

    jax.lax.fori_loop(jnp.maximum(total - STAGES, 0), total, wait, None)


def along(x: Array, shape: tuple[int, ...], axis: int = 0) -> Array:
    """A vector over the rows (axis 0) or the columns (1) of a tile."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def zeros(rows: int, columns: int) -> Array:
    """Sums in registers that nothing was added to."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), WGMMA)
