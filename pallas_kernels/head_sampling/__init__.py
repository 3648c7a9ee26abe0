"""Hidden rows times the vocabulary, of which only what sampling needs is kept."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.head_sampling import gpu, reference, tpu
from pallas_kernels.head_sampling.combine import combine
from pallas_kernels.head_sampling.reference import Layout, Projection, Samples, best, logits

__all__ = ["Layout", "Projection", "Samples", "best", "combine", "head_sampling", "logits"]


def head_sampling(
    hidden: Float[Array, "R D"],
    weight: Float[Array, "_ _"],
    given: Int32[Array, "R C"] | None = None,
    temperature: Float32[Array, "R"] | None = None,
    keys: UInt32[Array, "R 2"] | None = None,
    start: Int32[Array, ""] | None = None,
    *,
    projection: Projection,
    slots: int = 1,
    vocab: int | None = None,
    axis_name: str | Sequence[str] | None = None,
    implementation: Implementation | None = None,
) -> Samples:
    """The largest logits, log-sum-exp, chosen logits and a draw of each row, without writing the logits.

    Args:
        hidden: rows after the final norm.
        weight: [D, V] or [V, D], as `projection.layout` says; it is multiplied in the dtype of `hidden` with fp32 sums.
        given: tokens whose logits are asked for, and which the draw leaves out; ids outside the vocabulary are padding.
        temperature: above 0; asks for `total`.
        keys: asks for a draw, by the noise of (key, token id); needs a temperature.
        start: the id of this shard's first token, 0 if left out; found from `axis_name` where that is given.
        slots: how many of the largest logits to keep, at most the vocabulary.
        vocab: ids from here on are padding of the last shard.
        axis_name: mesh axes that the vocabulary is sharded over, inside `jax.shard_map`; shards are of one size.
            The samples are gathered (a few numbers a row) and combined, so that every device has those of the whole.

    Raises:
        ValueError: keys without a temperature, slots that the vocabulary does not have, or widths that differ.
    """
    model, size = projection.sizes(weight)
    if model != hidden.shape[1]:
        raise ValueError(f"rows have {hidden.shape[1]} columns and the {projection.layout} matrix takes {model}")
    if keys is not None and temperature is None:
        raise ValueError("keys ask for a draw, which needs a temperature")
    whole = size if axis_name is None else size * jax.lax.axis_size(axis_name)
    if not 1 <= slots <= whole:
        raise ValueError(f"slots is {slots}; give 1 to {whole}, the tokens of the vocabulary")
    if start is None:
        start = jnp.zeros((), jnp.int32) if axis_name is None else jax.lax.axis_index(axis_name) * jnp.int32(size)
    arguments = hidden, weight, given, temperature, keys, start
    out = dispatch(
        implementation,
        *arguments,
        reference=reference.sample,
        tpu=tpu.sample if slots <= tpu.LANES else None,
        gpu=gpu.sample if gpu.takes(hidden, weight, given, keys, slots, vocab) else None,
        projection=projection,
        slots=min(slots, size),
        vocab=vocab,
    )
    if axis_name is None:
        return out
    return combine(jax.lax.all_gather(out, axis_name), temperature, keys, slots)
