"""A part of a large vocabulary in place of the whole: the tokens of a batch, and others at random.

Each of the others stands for some that are left out (Jean et al., arXiv 1412.2007): its logit is raised by the log of
one over its chance to be there, so the sum that a likelihood divides by is right on the average.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dflash_jax.errors import InputError
from dflash_jax.models.head import Head
from dflash_jax.sharding import shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledVocabulary:
    """The tokens that are there, by ascending id, and what to add to their logits in a likelihood."""

    ids: Int[Array, "S"]
    raised: Float[Array, "S"]

    def head(self, head: Head) -> Head:
        """The head of these tokens alone, which numbers them by their place."""
        axis = 0 if head.projection.layout == "vd" else 1
        return dataclasses.replace(head, weight=jnp.take(head.weight, self.ids, axis=axis))

    def places(self, ids: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where tokens are that are there."""
        return jnp.searchsorted(self.ids, ids).astype(jnp.int32)


def check_size(size: int, tokens: int, vocab: int, ways: int) -> None:
    """InputError for a size that `sample_vocabulary` does not take of so many tokens, on a mesh that cuts it so."""
    if not tokens < size < vocab or size % ways:
        raise InputError(
            f"the vocabulary of a step is {size} tokens; give more than the {tokens} of its rows, fewer than the "
            f"model's {vocab}, and a multiple of {ways}, or 0 for all"
        )


def sample_vocabulary(key: Array, tokens: Int[Array, "B T"], size: int, vocab: int) -> SampledVocabulary:
    """All of `tokens`, and so many others that there are `size`, of the ids below `vocab`.

    InputError for a size that is not enough for any tokens, is more than there are, or that the mesh does not divide.
    """
    check_size(size, tokens.size, vocab, shards("vocab"))
    there = jnp.zeros(vocab, bool).at[tokens].set(True)
    order = jnp.where(there, 1.0, jax.random.uniform(key, (vocab,)))
    ids = jnp.sort(jax.lax.top_k(order, size)[1])
    own = jnp.sum(there)
    return SampledVocabulary(ids, jnp.where(there[ids], 0.0, jnp.log((vocab - own) / (size - own))))
