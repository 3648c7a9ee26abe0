"""Attention of a block of rows against a cache and against itself: the definition, in jnp."""

from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_attention.rows import gather_pages, write_rows

HIDDEN = -1e30  # a finite score: a row without any visible key stays finite
LEAST_GATHERED = 256  # rows of a sequence below which it does not pay to gather fewer


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
    taken = write and keys.shape[2] > 0

    def read(all_keys: Array, all_values: Array, together: bool) -> Array:
        seen = visible(lengths, W, all_keys.shape[2], causal, window, mask, depths, own=together)
        parts = [(all_keys, all_values, seen)] if all_keys.shape[2] else []
        if not together:
            parts.append((own[0], own[1], jnp.broadcast_to(own_mask(W, causal, window, mask, depths), (B, W, W))))
        out = masked_attention(q, parts, scale, soft_cap, sinks)
        return one_head(out, keys.shape[1], packed)

    def gathered(table: Array) -> Array:
        return read(*(gather_pages(c, table, lengths) for c in (keys, values)), together=False)

    if page_table is None:
        caches = [write_rows(c, rows, lengths) for c, rows in zip((keys, values), own, strict=True)] if taken else []
        out = read(*(caches or (keys, values)), together=taken)
    else:
        out = _by_longest(lengths, page_table, keys.shape[2], gathered)
        # Their place depends on what was read, by 0: a write that need not wait for the reading has XLA copy all pages.
        place = lengths + (out[:, 0, 0, 0] > jnp.inf)
        caches = [write_rows(c, r, place, page_table=page_table) for c, r in zip((keys, values), own, strict=True)]
    return (out, caches[0], caches[1]) if taken else (out, keys, values)


def _by_longest(
    lengths: Int[Array, "B"], page_table: Int[Array, "B n"], page: int, read: Callable[[Array], Array]
) -> Array:
    """`read` of the page table's first columns: half of them, a quarter, and so on, as long as no sequence has more.

    What is gathered then follows the longest sequence that has pages, and not the most that one could have.
    """
    columns = [page_table.shape[1]]
    while columns[-1] * page > LEAST_GATHERED:
        columns.append(-(-columns[-1] // 2))
    longest = jnp.max(jnp.where(page_table[:, 0] >= 0, lengths, 0))
    index = jnp.sum(jnp.asarray([longest <= n * page for n in columns[1:]], jnp.int32)) if columns[1:] else 0
    return jax.lax.switch(index, [lambda n=n: read(page_table[:, :n]) for n in columns])


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


def masked_attention(
    q: Array, parts: list[tuple[Array, Array, Array]], scale: float, soft_cap: float | None, sinks: Array | None
) -> Array:
    """q [B W N H] against parts of keys and values [B K S H], of which row w sees mask [B W S]; fp32 inside."""
    B, W, N, H = q.shape
    K = parts[0][0].shape[1]
    G = N // K
    grouped = q.reshape(B, W, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * W, H)

    def score(keys: Array, mask: Array) -> Array:
        # Keys on the left: with them on the right the CPU packs the whole cache anew (4x slower at 512 positions), and
        # so it does where XLA may put the axes in order within the product.
        x = jnp.einsum("bksh,bkrh->bksr", keys, grouped, preferred_element_type=jnp.float32)
        x = jax.lax.optimization_barrier(x).swapaxes(2, 3) * scale
        x = x if soft_cap is None else soft_cap * jnp.tanh(x / soft_cap)
        return jnp.where(mask[:, None, None], x.reshape(B, K, G, W, -1), HIDDEN)

    scores = [score(keys, mask) for keys, _, mask in parts]
    top = reduce(jnp.maximum, (jnp.max(x, -1) for x in scores))
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, K, G, 1)
    top = jax.lax.stop_gradient(top if sink is None else jnp.maximum(top, sink))
    weights = [jnp.exp(x - top[..., None]) for x in scores]
    total = reduce(jnp.add, (jnp.sum(x, -1) for x in weights))
    total = total if sink is None else total + jnp.exp(sink - top)

    def weigh(x: Array, values: Array) -> Array:
        x = x.reshape(B, K, G * W, -1).astype(values.dtype)
        return jnp.einsum("bkrs,bksh->bkrh", x, values, preferred_element_type=jnp.float32)

    out = reduce(jnp.add, (weigh(x, values) for x, (_, values, _) in zip(weights, parts, strict=True)))
    out = out.reshape(B, K, G, W, H) / total[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, W, N, H).astype(q.dtype)
