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
    nearest, farthest = grouped.min(1), grouped.max(1)
    high, whole_high = jnp.clip(farthest, 0, length), jnp.clip(nearest, 0, length)
    first = whole_first = starts.reshape(-1, per_step)
    if window is not None:  # the first row of a block sees farthest back, the last row least far
        first = jnp.maximum(first, grouped - window + 1)
        whole_first = jnp.maximum(whole_first, grouped + rows - window)
    low, whole_low = jnp.clip(first.min(1), 0, high), jnp.clip(whole_first.max(1), 0, length)
    begin, end = low // tile, -(-high // tile)
    whole_begin = jnp.clip(-(-whole_low // tile), begin, end)
    whole_end = jnp.clip(whole_high // tile, whole_begin, end)
    return jnp.stack([begin, whole_begin, whole_end, end])
