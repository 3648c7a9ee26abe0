"""Attention of a block of rows against a cache and against itself: the definition, in jnp."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_attention.rows import gather_pages, write_rows
from pallas_kernels.block_attention.sums import Sums, averaged, by_key_head, merged, summed

GATHERED = 128  # rows of each sequence that are gathered from their pages at a time


def visible(
    lengths: Int[Array, "B"],
    rows: int,
    capacity: int,
    causal: bool,
    window: int | None,
    mask: Bool[Array, "#B W W"] | None = None,
    depths: Int[Array, "#B W"] | None = None,
    own: bool = True,
) -> Bool[Array, "B W S"]:
    """Which cache positions a row sees: what is committed, and, where it lies behind that (`own`), of the block.

    Without a mask row i stands at `lengths[b] + i`, and sees the block up to itself (causal) or all of it. With a mask
    it stands at `lengths[b] + depths[b, i]`, and sees those rows of the block that the mask names. A window counts the
    row itself, and bounds what lies before it.
    """
    s = jnp.arange(capacity)
    depth = jnp.arange(rows)[None] if depths is None else depths
    positions = (lengths[:, None] + depth)[:, :, None]
    if mask is None and own:
        last = positions if causal else (lengths + rows - 1)[:, None, None]
        seen = s <= last
    else:
        seen = s < lengths[:, None, None]
    seen = jnp.broadcast_to(seen if window is None else seen & (s > positions - window), (len(lengths), rows, capacity))
    if mask is None or not own:
        return seen
    block = jnp.broadcast_to(own_mask(rows, causal, window, mask, depths), (len(lengths), rows, rows))
    return jax.vmap(lambda seen, own, n: jax.lax.dynamic_update_slice_in_dim(seen, own, n, axis=1))(
        seen, block, lengths
    )


def own_mask(
    rows: int,
    causal: bool,
    window: int | None,
    mask: Bool[Array, "#B W W"] | None,
    depths: Int[Array, "#B W"] | None,
) -> Bool[Array, "#B W W"]:
    """Which rows of the block a row of it sees."""
    depth = jnp.arange(rows)[None] if depths is None else depths
    if mask is None:
        mask = jnp.tri(rows, dtype=bool)[None] if causal else jnp.ones((1, rows, rows), bool)
    return mask if window is None else mask & (depth[:, None, :] > depth[:, :, None] - window)


def attend(
    q: Float[Array, "B W N H"],
    keys: Float[Array, "P K S H"],
    values: Float[Array, "P K S H"],
    block_keys: Float[Array, "B W K H"],
    block_values: Float[Array, "B W K H"],
    lengths: Int[Array, "B"],
    page_table: Int[Array, "B n"] | None,
    mask: Bool[Array, "#B W W"] | None,
    depths: Int[Array, "#B W"] | None,
    sinks: Float[Array, "N"] | None,
    *,
    causal: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    write: bool,
) -> tuple[Float[Array, "B W N H"], Float[Array, "P K S H"], Float[Array, "P K S H"]]:
    """The definition of `block_attention`: rows that are written lie behind the committed ones, others stay apart."""
    packed = keys.shape[3] // q.shape[3]
    q, block_keys, block_values = side_by_side(q, block_keys, block_values, packed)
    B, W = q.shape[:2]
    own = block_keys.swapaxes(1, 2), block_values.swapaxes(1, 2)
    queries, taken = by_key_head(q, keys.shape[1]), write and keys.shape[2] > 0

    def read(keys: Array, values: Array, lengths: Array, together: bool = False) -> Sums:
        seen = visible(lengths, W, keys.shape[2], causal, window, mask, depths, own=together)
        return summed(queries, keys, values, seen, scale, soft_cap)

    def read_pages(table: Array, lengths: Array) -> Sums:
        return read(gather_pages(keys, table, lengths), gather_pages(values, table, lengths), lengths)

    if page_table is None and taken:
        keys, values = (write_rows(c, rows, lengths) for c, rows in zip((keys, values), own, strict=True))
        sums = read(keys, values, lengths, together=True)
    else:
        block = jnp.broadcast_to(own_mask(W, causal, window, mask, depths), (B, W, W))
        sums = summed(queries, *own, block, scale, soft_cap)
        if page_table is not None:
            table, before = _in_window(page_table, keys.shape[2], lengths, window)
            sums = _over_pages(sums, table, keys.shape[2], lengths - before, read_pages)
        elif keys.shape[2] and window != 1:
            sums = merged(sums, read(*_rows_in_window(keys, values, lengths, window)))
    out = one_head(averaged(sums, sinks).astype(q.dtype), keys.shape[1], packed)
    if page_table is not None and taken:
        # Their place depends on what was read, by 0: a write that need not wait for the reading has XLA copy all pages.
        place = lengths + (out[:, 0, 0, 0] > jnp.inf)
        keys, values = (
            write_rows(c, r, place, page_table=page_table) for c, r in zip((keys, values), own, strict=True)
        )
    return out, keys, values


def _in_window(
    page_table: Int[Array, "B n"], page: int, lengths: Int[Array, "B"], window: int | None
) -> tuple[Int[Array, "B m"], Int[Array, "B"]]:
    """The columns of the table that the rows see any of, and how many committed rows lie before each one's first."""
    if window is None or (columns := 1 - (-max(0, window - 2) // page)) >= page_table.shape[1]:
        return page_table, jnp.zeros_like(lengths)
    first = jnp.maximum(lengths - window + 1, 0) // page
    at = first[:, None] + jnp.arange(columns)
    return jnp.take_along_axis(page_table, at, axis=1, mode="fill", fill_value=-1), first * page


def _rows_in_window(
    keys: Float[Array, "B K S H"], values: Float[Array, "B K S H"], lengths: Int[Array, "B"], window: int | None
) -> tuple[Array, Array, Array]:
    """The committed rows that the rows see any of, and how many these are."""
    room = keys.shape[2] if window is None else window - 1
    if room >= keys.shape[2]:
        return keys, values, lengths
    first = jnp.maximum(lengths - room, 0)
    cut = jax.vmap(lambda cache, at: jax.lax.dynamic_slice_in_dim(cache, at, room, axis=1))
    return cut(keys, first), cut(values, first), jnp.minimum(lengths, room)


def _over_pages(
    sums: Sums, page_table: Int[Array, "B n"], page: int, lengths: Int[Array, "B"], read: Callable[[Array, Array], Sums]
) -> Sums:
    """`sums` with what `read` finds in the pages, a few columns of the table at a time, as far as the longest reaches.

    `read` is given the columns, and how many committed rows there are from their first one on.
    """
    columns = min(max(1, GATHERED // page), page_table.shape[1])
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % columns)), constant_values=-1)
    longest = jnp.max(jnp.where(page_table[:, 0] >= 0, lengths, 0))

    def more(i: Array, sums: Sums) -> Sums:
        part = jax.lax.dynamic_slice_in_dim(table, i * columns, columns, axis=1)
        return merged(sums, read(part, lengths - i * columns * page))

    return jax.lax.fori_loop(0, -(-longest // (columns * page)), more, sums)


def side_by_side(q: Array, block_keys: Array, block_values: Array, packed: int) -> tuple[Array, Array, Array]:
    """The same attention with fewer, longer key heads: a query is zero where the other heads' numbers lie."""
    if packed == 1:
        return q, block_keys, block_values
    (B, W, N, H), K = q.shape, block_keys.shape[2] // packed
    apart = q.reshape(B, W, K, packed, N // K // packed, 1, H)
    own = jnp.eye(packed, dtype=bool)[:, None, :, None]
    q = jnp.where(own, apart, jnp.zeros_like(apart)).reshape(B, W, N, packed * H)
    return q, block_keys.reshape(B, W, K, packed * H), block_values.reshape(B, W, K, packed * H)


def one_head(out: Array, kv_heads: int, packed: int) -> Array:
    """Of each query head's output the numbers of its own key head."""
    if packed == 1:
        return out
    B, W, N, H = out.shape
    out = out.reshape(B, W, kv_heads, packed, N // kv_heads // packed, packed, H // packed)
    return jnp.stack([out[:, :, :, i, :, i] for i in range(packed)], 3).reshape(B, W, N, H // packed)
