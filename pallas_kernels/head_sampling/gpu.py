"""Mosaic GPU (Hopper): every program walks its share of the vocabulary, and the shares are combined as shards are.

One warpgroup a program: TMA brings chunks of the matrix and of the rows into a ring of buffers, WGMMA adds their
product to the logits of 64 rows and 128 tokens, which are looked at in registers and never written.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.head_sampling.combine import combine
from pallas_kernels.head_sampling.reference import Projection, Samples

Array = jax.Array
ROWS, TILE, CHUNK = 64, 128, 64  # rows of hidden, tokens, and columns of the model that a product takes
BUFFERS = 4  # 96 KiB: two programs fit a multiprocessor, and 128 KiB of the matrix are on their way to it
PROGRAMS = 2 * 132  # on the multiprocessors of an H100
NOTHING = -float("inf")
LAST = 2**31 - 1


@dataclass(frozen=True)
class Shape:
    """One call of the kernel."""

    blocks: int  # of rows
    shares: int  # of the vocabulary
    model: int
    size: int
    projection: Projection

    @property
    def chunks(self) -> int:
        """Products that a tile of logits is the sum of."""
        return -(-self.model // CHUNK)

    @property
    def tiles(self) -> int:
        """Tiles of the vocabulary."""
        return -(-self.size // TILE)


def takes(hidden: Any, weight: Any, given: Any, keys: Any, slots: int, vocab: int | None) -> bool:
    """Whether the kernel does this call: the largest logit and the total of bfloat16 rows."""
    half = hidden.dtype == jnp.bfloat16 and weight.dtype == jnp.bfloat16
    # TMA fills swizzled tiles of 8 x 64, and arrays have to consist of whole ones.
    aligned = weight.shape[0] % 8 == 0 and weight.shape[1] % 64 == 0 and hidden.shape[1] % 64 == 0
    return half and aligned and given is None and keys is None and slots == 1 and vocab is None


def sample(
    hidden: Array,
    weight: Array,
    given: None,
    temperature: Array | None,
    keys: None,
    start: Array,
    *,
    projection: Projection,
    slots: int,
    vocab: int | None,
) -> Samples:
    """See `reference.sample`; for calls that `takes` accepts."""
    count, (model, size) = hidden.shape[0], projection.sizes(weight)
    blocks = -(-count // ROWS)
    shares = min(max(PROGRAMS // blocks, 1), -(-size // TILE))
    padding = blocks * ROWS - count
    warmth = jnp.ones(count) if temperature is None else temperature
    values, ids, totals = _call(
        Shape(blocks, shares, model, size, projection),
        jnp.pad(hidden, ((0, padding), (0, 0))),
        weight,
        jnp.pad(warmth.astype(jnp.float32), (0, padding), constant_values=1),
    )
    parts = Samples(values[:, :count, None], start + ids[:, :count, None], None, totals[:, :count], None, None)
    out = combine(parts, warmth, None, slots)
    return out if temperature is not None else Samples(out.values, out.ids, None, None, None, None)


def _call(s: Shape, hidden: Array, weight: Array, temperature: Array) -> list[Array]:
    """The largest logits [shares, R] of each share, their ids, and the totals."""
    tile = (CHUNK, TILE) if s.projection.layout == "dv" else (TILE, CHUNK)
    return plgpu.kernel(
        partial(_program, s),
        out_type=[
            jax.ShapeDtypeStruct((s.shares, s.blocks * ROWS), dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32)
        ],
        # Programs of one share are neighbours: they read it together, and the cache serves all but the first.
        grid=(s.blocks, s.shares),
        grid_names=("block", "share"),
        scratch_types=[
            hopper.swizzled((BUFFERS, ROWS, CHUNK)),
            hopper.swizzled((BUFFERS, *tile)),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.int32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=2, num_barriers=BUFFERS),
        ],
    )(hidden, weight, temperature)


def _program(
    s: Shape, hidden: Any, weight: Any, temperature: Any, values: Any, ids: Any, totals: Any, rows_ring: Any,
    weight_ring: Any, value_tile: Any, id_tile: Any, total_tile: Any, ready: Any, arrived: Any,
) -> None:  # fmt: skip
    """One block of rows against one share of the vocabulary."""
    block, share = jax.lax.axis_index("block"), jax.lax.axis_index("share")
    rows = pl.ds(block * ROWS, ROWS)
    each = -(-s.tiles // s.shares)
    begin = jnp.minimum(share * each, s.tiles)
    end = jnp.minimum(begin + each, s.tiles)
    steps = (end - begin) * s.chunks

    def fetch(step: Any) -> None:
        slot, chunk = jax.lax.rem(step, BUFFERS), pl.ds(jax.lax.rem(step, s.chunks) * CHUNK, CHUNK)
        tokens = pl.ds((begin + jax.lax.div(step, s.chunks)) * TILE, TILE)
        source = weight.at[chunk, tokens] if s.projection.layout == "dv" else weight.at[tokens, chunk]
        plgpu.copy_gmem_to_smem(hidden.at[rows, chunk], rows_ring.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(source, weight_ring.at[slot], arrived.at[slot])

    plgpu.copy_gmem_to_smem(temperature.at[rows], total_tile, ready)
    for step in range(BUFFERS - 1):
        pl.when(step < steps)(partial(fetch, jnp.int32(step)))
    plgpu.barrier_wait(ready)
    warmth = plgpu.layout_cast(total_tile[...], plgpu.Layout.WGMMA.reduce(1))

    def tile_step(tile: Any, carry: Any) -> Any:
        def products(acc: Any) -> Array:
            def add(chunk: Any, _: None) -> None:
                step = (tile - begin) * s.chunks + chunk
                slot = jax.lax.rem(step, BUFFERS)
                plgpu.barrier_wait(arrived.at[slot])
                hopper.add_product(acc, rows_ring.at[slot], weight_ring.at[slot], s.projection.layout == "vd")
                # The product before is done, so its buffer may be filled again.
                pl.when(step + BUFFERS - 1 < steps)(lambda: fetch(step + BUFFERS - 1))

            jax.lax.fori_loop(0, s.chunks, add, None)
            return acc[...]

        logits = s.projection.finish(hopper.accumulated(products, (ROWS, TILE)))
        return _look(s, logits, tile, warmth, carry)

    zero = warmth * 0.0
    start = zero + NOTHING, zero.astype(jnp.int32), zero
    value_tile[...], id_tile[...], total_tile[...] = jax.lax.fori_loop(begin, end, tile_step, start)
    plgpu.commit_smem()
    for tile, out in ((value_tile, values), (id_tile, ids), (total_tile, totals)):
        plgpu.copy_smem_to_gmem(tile, out.at[share, rows])
    plgpu.wait_smem_to_gmem(0)


def _look(s: Shape, logits: Array, tile: Any, warmth: Array, carry: Any) -> Any:
    """The largest logit, its id (lowest on ties) and the total, after one more tile."""
    top, best, total = carry

    def wide(row: Array) -> Array:
        return jax.lax.broadcast_in_dim(row, logits.shape, (0,))

    ids = tile * TILE + plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
    logits = jnp.where(ids < s.size, logits, NOTHING)
    value = logits.max(axis=1)
    id = jnp.where(logits == wide(value), ids, LAST).min(axis=1)
    higher = jnp.maximum(top, value)
    best = jnp.where(value > top, id, best)
    added = jnp.exp((logits - wide(higher)) / wide(warmth)).sum(axis=1)
    return higher, best, total * jnp.exp((top - higher) / warmth) + added
