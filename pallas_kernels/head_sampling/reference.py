"""What sampling needs of the logits [R, V] of R rows: the definition, in jnp, over whole logits.

Notation: R rows, D model, V vocabulary (or this device's shard of it), S slots, C given tokens a row.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels.head_sampling.noise import gumbel

Layout = Literal["dv", "vd"]  # an lm_head, or a table of embeddings
PARTS = 64  # of a table of embeddings, for more than one row up to `FEW`; divides the vocabularies of most models
FEW = 96


@dataclass(frozen=True)
class Projection:
    """How hidden rows become logits. Static."""

    layout: Layout
    multiplier: float = 1.0
    soft_cap: float | None = None  # cap * tanh(logits / cap), after the multiplier

    def sizes(self, weight: Array) -> tuple[int, int]:
        """(D, V) of a matrix in this layout."""
        model, vocab = weight.shape if self.layout == "dv" else weight.shape[::-1]
        return model, vocab

    def finish(self, products: Float32[Array, "..."]) -> Float32[Array, "..."]:
        """The products of hidden rows and vocabulary as logits."""
        logits = products if self.multiplier == 1.0 else products * self.multiplier
        return logits if self.soft_cap is None else jnp.tanh(logits / self.soft_cap) * self.soft_cap


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """What is kept of R rows of logits. Ids are global; ties go to the lowest id everywhere.

    total is the sum over the vocabulary of exp((logit - largest logit) / temperature), so that
    log p(token) = (logit - values[:, 0]) / temperature - log(total). None where no temperature was given.
    drawn_* is the token of the largest (logit - largest logit) / temperature + noise among all but the given ones.
    None where no keys were given.
    """

    values: Float32[Array, "R S"]  # the largest logits, descending
    ids: Int32[Array, "R S"]
    given: Float32[Array, "R C"] | None  # the given tokens' logits, -inf for ids outside the vocabulary
    total: Float32[Array, "R"] | None
    drawn_ids: Int32[Array, "R 1"] | None
    drawn_logits: Float32[Array, "R 1"] | None


def logits(
    projection: Projection, hidden: Float[Array, "... D"], weight: Float[Array, "_ _"]
) -> Float32[Array, "... V"]:
    """The logits in fp32, whole."""
    weight = weight.astype(hidden.dtype)
    if projection.layout == "dv":
        products = _product("...d,dv->...v", hidden, weight)
    elif not 1 < hidden.size // hidden.shape[-1] <= FEW or weight.shape[0] % PARTS:
        products = _product("...d,vd->...v", hidden, weight)
    else:
        whole = partial(_product, "...d,vd->...v")
        products = jax.lax.platform_dependent(hidden, weight, cpu=_in_parts, default=whole)
    return projection.finish(products)


def _in_parts(hidden: Array, weight: Array) -> Array:
    """The product with a table of embeddings, as one of many small matrices.

    XLA's product of a few rows and a large [V, D] on the CPU takes 110 ms where this takes 17 (6 rows, 49152 x 576).
    """
    table = weight.reshape(PARTS, -1, weight.shape[1])
    products = _product("...d,pvd->p...v", hidden, table)
    return jnp.moveaxis(products, 0, -2).reshape(*hidden.shape[:-1], -1)


def _product(equation: str, hidden: Array, weight: Array) -> Array:
    return jnp.einsum(equation, hidden, weight, preferred_element_type=jnp.float32)


def best(scores: Float32[Array, "*N V"], ids: Int32[Array, "*#N V"] | None = None) -> Int32[Array, "*N"]:
    """The highest score's id, the lowest on ties, in two passes that vectorise, 6 times as fast as argmax on the CPU.

    Ids are 0, 1, ... where they are not given.
    """
    size = scores.shape[-1]
    top = jnp.max(scores, axis=-1, keepdims=True)
    if ids is None:
        return jnp.min(jnp.where(scores == top, jnp.arange(size, dtype=jnp.int32), size - 1), axis=-1)
    return jnp.min(jnp.where(scores == top, ids, jnp.iinfo(jnp.int32).max), axis=-1)


def sample(
    hidden: Float[Array, "R D"],
    weight: Float[Array, "_ _"],
    given: Int32[Array, "R C"] | None,
    temperature: Float32[Array, "R"] | None,
    keys: UInt32[Array, "R 2"] | None,
    start: Int32[Array, ""],
    *,
    projection: Projection,
    slots: int,
    vocab: int | None,
) -> Samples:
    """The samples of one shard, whose first token is `start`; ids from `vocab` on do not exist."""
    scores = logits(projection, hidden, weight)
    size = scores.shape[-1]
    ids = start + jnp.arange(size, dtype=jnp.int32)
    if vocab is not None:
        scores = jnp.where(ids < vocab, scores, -jnp.inf)
    values, places = (jnp.max(scores, -1)[:, None], best(scores)[:, None]) if slots == 1 else _top(scores, slots)
    out, rest = Samples(values, start + places, None, None, None, None), scores
    if given is not None:
        place = given - start
        inside = (place >= 0) & (place < size)
        out = replace(out, given=jnp.where(inside, _at(scores, jnp.where(inside, place, 0)), -jnp.inf))
        rows = jnp.arange(scores.shape[0])[:, None]
        rest = scores.at[rows, jnp.where(inside, place, size)].set(-jnp.inf, mode="drop")
    if temperature is None:
        return out
    out = replace(out, total=jnp.sum(jnp.exp(warm(scores, values[:, :1], temperature[:, None])), -1))
    if keys is None:
        return out
    noisy = warm(rest, values[:, :1], temperature[:, None]) + gumbel(keys, jnp.broadcast_to(ids, scores.shape))
    drawn = best(noisy)[:, None]
    return replace(out, drawn_ids=start + drawn, drawn_logits=_at(rest, drawn))


def warm(
    scores: Float32[Array, "R S"], top: Float32[Array, "R 1"], temperature: Float32[Array, "R 1"]
) -> Float32[Array, "R S"]:
    """Logits over temperature, at most 0; -inf stays, also where nothing is larger (a shard that is all padding)."""
    # The maximum goes first: no temperature overflows, and the leading tokens keep all their digits.
    return jnp.where(scores > -jnp.inf, -((top - scores) / temperature), -jnp.inf)


def _top(scores: Array, slots: int) -> tuple[Array, Array]:
    values, places = jax.lax.top_k(scores, min(slots, scores.shape[-1]))
    return values, places.astype(jnp.int32)


def _at(scores: Array, places: Array) -> Array:
    return jnp.take_along_axis(scores, places, axis=-1)
