"""Blocks that are longer than a kernel takes, as prompts are: in parts, each committed before the next."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Attend = Callable[..., tuple[Array, Array, Array]]


def in_parts(
    run: Attend, most: int, q: Array, keys: Array, values: Array, block_keys: Array, block_values: Array,
    lengths: Array, *rest: Any,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """What `run`, which takes blocks of up to `most` rows, makes of a causal block of any length that it writes."""
    W = q.shape[1]

    def part(keys: Array, values: Array, i: Any, rows: int) -> tuple[Array, Array, Array]:
        own = (jax.lax.dynamic_slice_in_dim(x, i, rows, axis=1) for x in (q, block_keys, block_values))
        some, block_keys_, block_values_ = own
        return run(some, keys, values, block_keys_, block_values_, lengths + i, *rest)

    def step(caches: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        out, keys, values = part(*caches, i, most)
        return (keys, values), out

    (keys, values), outs = jax.lax.scan(step, (keys, values), jnp.arange(W // most) * most)
    parts = [jnp.moveaxis(outs, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])]
    if W % most:
        out, keys, values = part(keys, values, W // most * most, W % most)
        parts.append(out)
    return jnp.concatenate(parts, 1), keys, values
