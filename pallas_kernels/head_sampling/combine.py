"""Samples of the shards of a vocabulary as the samples of the whole."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32

from pallas_kernels.head_sampling.noise import gumbel
from pallas_kernels.head_sampling.reference import Samples, best, warm


def combine(
    shards: Samples, temperature: Float32[Array, "R"] | None, keys: UInt32[Array, "R 2"] | None, slots: int
) -> Samples:
    """Every array of `shards` has a leading axis of shards, whose ids ascend. Ties go to the lowest id."""
    tops = shards.values[..., 0]
    top = jnp.max(tops, axis=0)[:, None]
    # Equal values stand in the order of their ids, within a shard and from one shard to the next, and top_k keeps it.
    values, places = jax.lax.top_k(_rows(shards.values), min(slots, _rows(shards.values).shape[-1]))
    total = drawn_ids = drawn_logits = None
    if shards.total is not None and temperature is not None:
        total = jnp.sum(shards.total.T * jnp.exp(warm(tops.T, top, temperature[:, None])), -1)
    if (
        shards.drawn_ids is not None
        and shards.drawn_logits is not None
        and keys is not None
        and temperature is not None
    ):
        ids, drawn = _rows(shards.drawn_ids), _rows(shards.drawn_logits)
        noisy = warm(drawn, top, temperature[:, None]) + gumbel(keys, ids)
        drawn_ids = best(noisy, ids)[:, None]
        drawn_logits = jnp.max(jnp.where(ids == drawn_ids, drawn, -jnp.inf), -1, keepdims=True)
    return Samples(
        values=values,
        ids=jnp.take_along_axis(_rows(shards.ids), places, axis=-1),
        given=None if shards.given is None else jnp.max(shards.given, axis=0),
        total=total,
        drawn_ids=drawn_ids,
        drawn_logits=drawn_logits,
    )


def _rows(slots: Array) -> Array:
    """[shards, R, S] as [R, shards * S]."""
    return jnp.swapaxes(slots, 0, 1).reshape(slots.shape[1], -1)
