"""Rows of keys or values into a cache, and pages out of it, in jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def write_rows(
    cache: Float[Array, "P Kp S Hp"],
    rows: Float[Array, "B K W H"],
    start: Int[Array, "B"],
    count: Int[Array, "B"] | None = None,
    *,
    page_table: Int[Array, "B n"] | None = None,
) -> Float[Array, "P Kp S Hp"]:
    """The cache with row i of sequence b at `start[b] + i`, for i < `count[b]` only where that is given.

    Dense (no page table, P = B): all W rows must have room, start + W <= S. Paged (S rows a page): position s of
    sequence b is row s % S of page `page_table[b, s // S]`; where that entry is negative, or past the table's end,
    the row is dropped. The cache may hold heads side by side, see `block_attention`.
    """
    rows = pack(rows, cache.shape[3] // rows.shape[3])
    if page_table is not None:
        return _scatter(cache, rows.astype(cache.dtype), start, count, page_table)

    def place(cache: Array, rows: Array, start: Array, count: Array | None) -> Array:
        if count is not None:
            old = jax.lax.dynamic_slice_in_dim(cache, start, rows.shape[1], axis=1)
            rows = jnp.where((jnp.arange(rows.shape[1]) < count)[:, None], rows, old)
        return jax.lax.dynamic_update_slice_in_dim(cache, rows, start, axis=1)

    return jax.vmap(place)(cache, rows.astype(cache.dtype), start, count)


def pack(rows: Float[Array, "B K W H"], heads: int) -> Float[Array, "B Kp W Hp"]:
    """Rows with `heads` heads side by side in one."""
    B, K, W, H = rows.shape
    if heads == 1:
        return rows
    return rows.reshape(B, K // heads, heads, W, H).swapaxes(2, 3).reshape(B, K // heads, W, heads * H)


def _scatter(cache: Array, rows: Array, start: Array, count: Array | None, page_table: Array) -> Array:
    P, page, n = cache.shape[0], cache.shape[2], page_table.shape[1]
    i = jnp.arange(rows.shape[2])
    at = start[:, None] + i  # [B W]
    ids = jnp.take_along_axis(page_table, jnp.minimum(at // page, n - 1), axis=1)
    kept = (ids >= 0) & (at < n * page)
    if count is not None:
        kept &= i < count[:, None]
    # A dropped row gets an id past the last page: a negative one would count from the end.
    return cache.at[jnp.where(kept, ids, P), :, at % page].set(rows.swapaxes(1, 2), mode="drop")


def gather_pages(
    cache: Float[Array, "P K S H"], page_table: Int[Array, "B n"], lengths: Int[Array, "B"]
) -> Float[Array, "B K T H"]:
    """The committed rows of each sequence in order, in a dense cache with zeros behind."""
    B, n = page_table.shape
    pages = cache[jnp.maximum(page_table, 0)].swapaxes(1, 2)  # [B K n page H]
    dense = pages.reshape(B, cache.shape[1], n * cache.shape[2], cache.shape[3])
    committed = jnp.arange(dense.shape[2]) < lengths[:, None]
    return jnp.where(committed[:, None, :, None], dense, 0)
