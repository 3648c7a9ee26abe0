"""How far into the context the blocks of one grid step see."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def bounds(
    anchors: Int[Array, "B A"],
    starts: Int[Array, "B A"],
    *,
    per_step: int,
    rows: int,
    tile: int,
    length: int,
    window: int | None,
) -> Int[Array, "4 BS"]:
    """Of each step of `per_step` blocks, in context tiles: where to begin, where those begin that all rows see whole,
    where these end, and where to end.

    Tiles outside begin..end are neither loaded nor computed; tiles outside the inner two need no mask.
    """
    grouped = anchors.reshape(-1, per_step)
    high, whole_high = jnp.clip(grouped.max(1), 0, length), jnp.clip(grouped.min(1), 0, length)
    first = whole_first = starts.reshape(-1, per_step)
    if window is not None:  # the first row of a block sees farthest back, the last row least far
        first = jnp.maximum(first, grouped - window + 1)
        whole_first = jnp.maximum(whole_first, grouped + rows - window)
    return in_tiles(first.min(1), jnp.clip(whole_first.max(1), 0, length), whole_high, high, tile)


def in_tiles(
    low: Int[Array, "n"], whole_low: Int[Array, "n"], whole_high: Int[Array, "n"], high: Int[Array, "n"], tile: int
) -> Int[Array, "4 n"]:
    """`bounds` of steps that see positions low..high in part, and whole_low..whole_high whole."""
    begin, end = jnp.clip(low, 0, high) // tile, -(-high // tile)
    whole_begin = jnp.clip(-(-whole_low // tile), begin, end)
    whole_end = jnp.clip(whole_high // tile, whole_begin, end)
    return jnp.stack([begin, whole_begin, whole_end, end])
