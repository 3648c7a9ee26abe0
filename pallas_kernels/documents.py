"""Several documents in one row: where each begins.

`segments` numbers the documents of a row 1, 2, ... one after the other; 0 is padding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def document_starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Of each place, where its document begins: the first place from which on the number has not changed."""
    at = jnp.arange(segments.shape[1])
    changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(changes, at, 0), axis=1)


def positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Of each place, how many of its own document come before it."""
    return jnp.arange(segments.shape[1]) - document_starts(segments)
