"""Block attention on Hopper GPUs: Mosaic GPU, one warpgroup a program, pages by TMA in two buffers.

The rows are written into the cache by XLA in front of the kernel (in place where the cache is donated); the kernel
reads what is committed, and takes the block itself from where it was computed.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.block_attention.parts import in_parts
from pallas_kernels.block_attention.plan import round_up
from pallas_kernels.block_attention.reference import one_head, own_mask, side_by_side
from pallas_kernels.block_attention.rows import write_rows
from pallas_kernels.block_attention.sums import HIDDEN

Array = jax.Array
TILE = 64  # query rows of a program, and cache rows of a step: what one WGMMA takes
MULTIPROCESSORS = 132  # of an H100
PART = 512  # cache rows that are worth a program of their own, where there are fewer programs than multiprocessors


@dataclass(frozen=True)
class Shape:
    """One call of the kernel."""

    batch: int
    kv_heads: int
    rows: int  # W * G, padded to whole tiles
    head_dim: int
    page: int
    pages: int
    paged: bool
    trees: bool  # a mask for each sequence
    scale: float
    window: int | None
    soft_cap: float | None
    splits: int
    dtype: Any  # of the output of a part

    @property
    def lanes(self) -> int:
        """Columns of the accumulator that are worked on together: half of a head of 256 fits the registers."""
        return min(self.head_dim, 128)


def reason_against(q: Any, keys: Any, causal: bool, mask: Any, write: bool) -> str | None:
    """Why the kernel does not take a call; None where it does."""
    _, W, N, _ = q.shape
    _, K, page, H = keys.shape
    if keys.dtype != jnp.bfloat16 or q.dtype != keys.dtype:
        return "queries and cache are bfloat16"
    if H not in (64, 128, 256) or not page or page % TILE:
        return f"heads of 64, 128 or 256 numbers, pages of a multiple of {TILE} rows"
    if W > TILE and not (causal and mask is None and write):
        return f"a block of more than {TILE} rows is causal, without a mask, and written"
    return None if N % K == 0 else "query heads share key heads evenly"


def attend(q: Array, *rest: Any, **options: Any) -> tuple[Array, Array, Array]:
    """What `reference.attend` computes; a long causal block in parts, each committed before the next."""
    run = partial(_block, **options)
    if q.shape[1] <= TILE:
        return run(q, *rest)
    *given, _, _, sinks = rest  # there is no mask
    return in_parts(run, TILE, q, *given, None, None, sinks)


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
    causal: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    write: bool,
) -> tuple[Array, Array, Array]:
    packed = keys.shape[3] // q.shape[3]
    q, block_keys, block_values = side_by_side(q, block_keys, block_values, packed)
    own_keys, own_values = (rows.swapaxes(1, 2).astype(keys.dtype) for rows in (block_keys, block_values))
    if write:
        keys = write_rows(keys, own_keys, lengths, page_table=page_table)
        values = write_rows(values, own_values, lengths, page_table=page_table)
    (B, W, N, H), (_, K, page, _) = q.shape, keys.shape
    G, pages = N // K, 1 if page_table is None else page_table.shape[1]
    programs = B * K * -(-W * G // TILE)
    splits = max(min(MULTIPROCESSORS // programs, page * pages // PART), 1)
    s = Shape(
        batch=B, kv_heads=K, rows=round_up(W * G, TILE), head_dim=H, page=page, pages=pages,
        paged=page_table is not None, trees=mask is not None, scale=scale, window=window, soft_cap=soft_cap,
        splits=splits, dtype=q.dtype if splits == 1 else jnp.float32,
    )  # fmt: skip
    trees = B if s.trees else 1
    seen = jnp.broadcast_to(own_mask(W, causal, window, mask, depths), (trees, W, W))
    depth = jnp.broadcast_to(jnp.arange(W) if depths is None else depths, (trees, W)).astype(jnp.int32)
    sink = jnp.full((K, G), HIDDEN) if sinks is None else sinks.astype(jnp.float32).reshape(K, G)
    out, stats = call(
        s,
        lengths.astype(jnp.int32),
        jnp.zeros(1, jnp.int32) if page_table is None else page_table.reshape(-1).astype(jnp.int32),
        padded(q.reshape(B, W, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, W * G, H), (2, s.rows)),
        padded(own_keys, (2, TILE)),
        padded(own_values, (2, TILE)),
        padded(jnp.repeat(jnp.where(seen, 0.0, HIDDEN), G, axis=1), (1, s.rows), (2, TILE), fill=HIDDEN),
        padded(jnp.repeat(depth, G, axis=1), (1, s.rows)),
        padded(jnp.tile(sink, (1, W)), (1, s.rows)),
        keys,
        values,
    )
    out = out[0] if s.splits == 1 else jnp.sum(out * jax.nn.softmax(stats, 0)[..., None], 0)
    out = out[:, :, : W * G].reshape(B, K, W, G, H).transpose(0, 2, 1, 3, 4).reshape(B, W, N, H).astype(q.dtype)
    return one_head(out, K, packed), keys, values


def padded(x: Array, *sizes: tuple[int, int], fill: float = 0) -> Array:
    """x with each (axis, size) filled up."""
    pad = [(0, 0)] * x.ndim
    for axis, size in sizes:
        pad[axis] = 0, size - x.shape[axis]
    return jnp.pad(x, pad, constant_values=fill)


def call(s: Shape, *arrays: Array) -> tuple[Array, Array]:
    """Parts of the output [splits B K R H], each divided by its own sum, and log-sum-exps [splits B K R]."""
    lead = s.splits, s.batch, s.kv_heads
    half = jnp.bfloat16
    return plgpu.kernel(
        partial(program, s),
        out_type=[
            jax.ShapeDtypeStruct((*lead, s.rows, s.head_dim), s.dtype),
            jax.ShapeDtypeStruct((*lead, s.rows), jnp.float32),
        ],
        grid=(s.splits, s.rows // TILE, s.batch * s.kv_heads),
        grid_names=("split", "row", "unit"),
        scratch_types=[
            hopper.swizzled((TILE, s.head_dim), half),
            hopper.swizzled((2, TILE, s.head_dim), half),
            hopper.swizzled((2, TILE, s.head_dim), half),
            hopper.swizzled((TILE, TILE), half),
            hopper.swizzled((TILE, TILE), jnp.float32),
            plgpu.SMEM((TILE,), jnp.int32),
            plgpu.SMEM((TILE,), jnp.float32),
            hopper.swizzled((TILE, s.lanes), s.dtype),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
    )(*arrays)


def program(
    s: Shape, lengths: Any, table: Any, q: Any, own_keys: Any, own_values: Any, own_seen: Any, depths: Any, sinks: Any,
    keys: Any, values: Any, out: Any, stats: Any, q_tile: Any, key_tiles: Any, value_tiles: Any, weights_tile: Any,
    seen_tile: Any, depth_tile: Any, sink_tile: Any, out_tile: Any, ready: Any, arrived: Any,
) -> None:  # fmt: skip
    """One tile of query rows against one part of its context, in one warpgroup."""
    split, row, unit = (jax.lax.axis_index(name) for name in ("split", "row", "unit"))
    b, k = jax.lax.div(unit, s.kv_heads), jax.lax.rem(unit, s.kv_heads)
    rows, tree = pl.ds(row * TILE, TILE), b if s.trees else 0
    length = lengths[b]
    begin, end = part_of(s, length, split)
    by_row = plgpu.Layout.WGMMA.reduce(1)

    def fetch(tile: Any, slot: Any) -> None:
        start = tile * TILE
        index = jax.lax.div(start, s.page)
        page = table[b * s.pages + index] if s.paged else b
        place = pl.ds(start - index * s.page, TILE)
        plgpu.copy_gmem_to_smem(keys.at[page, k, place], key_tiles.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(values.at[page, k, place], value_tiles.at[slot], arrived.at[slot])

    plgpu.copy_gmem_to_smem(q.at[b, k, rows], q_tile, ready)
    plgpu.copy_gmem_to_smem(own_seen.at[tree, rows], seen_tile, ready)
    plgpu.copy_gmem_to_smem(depths.at[tree, rows], depth_tile, ready)
    plgpu.copy_gmem_to_smem(sinks.at[k, rows], sink_tile, ready)
    plgpu.copy_gmem_to_smem(own_keys.at[b, k], key_tiles.at[0], arrived.at[0])
    plgpu.copy_gmem_to_smem(own_values.at[b, k], value_tiles.at[0], arrived.at[0])
    pl.when(begin < end)(lambda: fetch(begin, 1))
    plgpu.barrier_wait(ready)
    # The block and the sinks belong to the last part of the context; what the others add for them is wiped or weighs 0.
    last = split == s.splits - 1
    away = jnp.where(last, 0.0, HIDDEN)
    sink = plgpu.layout_cast(sink_tile[...], by_row) + away
    top = jnp.maximum(sink, HIDDEN)
    total = jnp.exp(sink - top) * jnp.where(sink > 0.5 * HIDDEN, 1.0, 0.0)
    acc = tuple(
        plgpu.layout_cast(jnp.zeros((TILE, s.lanes), jnp.float32), plgpu.Layout.WGMMA)
        for _ in range(s.head_dim // s.lanes)
    )
    depth = plgpu.layout_cast(depth_tile[...], by_row)
    own = plgpu.layout_cast(seen_tile[...], plgpu.Layout.WGMMA) + away
    step = partial(softmax_step, s, q_tile, key_tiles, value_tiles, weights_tile)
    plgpu.barrier_wait(arrived.at[0])
    carry = step(0, lambda scores: scores + own, (top, total, acc))

    def one(tile: Any, carry: Any) -> Any:
        slot = jax.lax.rem(tile - begin + 1, 2)
        pl.when(tile + 1 < end)(lambda: fetch(tile + 1, 1 - slot))
        plgpu.barrier_wait(arrived.at[slot])
        clear(s, value_tiles, slot, length - tile * TILE)

        def hide(scores: Array) -> Array:
            iota = partial(plgpu.broadcasted_iota, jnp.int32, (TILE, TILE), layout=plgpu.Layout.WGMMA)
            column = iota(1) + tile * TILE
            seen = column < length
            if s.window is not None:
                first = jax.lax.broadcast_in_dim(depth + (length - s.window), (TILE, TILE), (0,))
                seen = seen & (column > first)
            return jnp.where(seen, scores, HIDDEN)

        return step(slot, hide, carry)

    top, total, acc = jax.lax.fori_loop(begin, end, one, carry)
    sink_tile[...] = top + jnp.log(total)
    for i, part in enumerate(acc):
        out_tile[...] = (part / jax.lax.broadcast_in_dim(total, part.shape, (0,))).astype(s.dtype)
        plgpu.commit_smem()
        lanes = pl.ds(i * s.lanes, s.lanes)
        plgpu.copy_smem_to_gmem(out_tile, out.at[split, b, k, rows, lanes])
        if i == 0:
            plgpu.copy_smem_to_gmem(sink_tile, stats.at[split, b, k, rows])
        plgpu.wait_smem_to_gmem(0)


def part_of(s: Shape, length: Any, split: Any) -> tuple[Any, Any]:
    """The tiles of the context that a program reads: none past the committed rows, none before the window."""
    first = jnp.int32(0)
    if s.window is not None:
        first = jax.lax.div(jnp.maximum(length - s.window + 1, 0), TILE)
    tiles = jax.lax.div(length + TILE - 1, TILE)
    share = jax.lax.div(tiles - first + s.splits - 1, s.splits)
    begin = jnp.minimum(first + split * share, tiles)
    return begin, jnp.minimum(begin + share, tiles)


def clear(s: Shape, value_tiles: Any, slot: Any, rows: Any) -> None:
    """Zeros behind the committed rows of a tile: there may be anything, and nothing times NaN is NaN."""

    @pl.when(rows < TILE)
    def _() -> None:
        for i in range(s.head_dim // 64):
            lanes = pl.ds(i * 64, 64)
            tile = plgpu.layout_cast(value_tiles[slot, :, lanes], plgpu.Layout.WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, (TILE, 64), 0, layout=plgpu.Layout.WGMMA)
            value_tiles[slot, :, lanes] = jnp.where(row < rows, tile.astype(jnp.float32), 0.0).astype(tile.dtype)
        plgpu.commit_smem()


def multiply(x: Any, y: Any, columns: int, turned: bool) -> Array:
    """The product [TILE, columns] of two tiles in shared memory by WGMMA, in fp32; `turned`: of x and y transposed."""

    def product(ref: Any) -> Array:
        plgpu.wgmma(ref, x, y.transpose((1, 0)) if turned else y)
        return ref[...]

    return hopper.accumulated(product, (TILE, columns))


def softmax_step(
    s: Shape, q_tile: Any, key_tiles: Any, value_tiles: Any, weights_tile: Any, slot: Any, hide: Any, carry: Any
) -> Any:
    """The softmax goes on over the tile in a buffer; `hide` masks its scores."""
    top, total, acc = carry
    scores = multiply(q_tile, key_tiles.at[slot], TILE, turned=True) * s.scale
    if s.soft_cap is not None:
        scores = s.soft_cap * jnp.tanh(scores / s.soft_cap)
    scores = hide(scores)
    higher = jnp.maximum(top, scores.max(axis=1))
    weights = jnp.exp(scores - jax.lax.broadcast_in_dim(higher, scores.shape, (0,)))
    kept = jnp.exp(top - higher)
    total = total * kept + weights.sum(axis=1)
    weights_tile[...] = weights.astype(jnp.bfloat16)
    plgpu.commit_smem()
    out = []
    for i, part in enumerate(acc):
        more = multiply(weights_tile, value_tiles.at[slot, :, pl.ds(i * s.lanes, s.lanes)], s.lanes, turned=False)
        out.append(part * jax.lax.broadcast_in_dim(kept, part.shape, (0,)) + more)
    return higher, total, tuple(out)
