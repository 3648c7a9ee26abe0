"""The target's logits as far as a decision needs them: all of them, or a few a row that the kernel has picked."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from dflash_jax.decoding.masks import TokenMask
from dflash_jax.decoding.noise import row_keys
from dflash_jax.decoding.sampling import History, Sampling, adjusted, filtered, is_random, temperature_of, warm
from dflash_jax.models.head import Head
from pallas_kernels.head_sampling import best
from pallas_kernels.head_sampling.noise import gumbel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shortlist:
    """The tokens that can follow each row.

    Listed are the largest logit, and every token that a draw with its position's noise can choose, from the target's
    distribution or from what is left of it when candidates of a draft are taken off. A token may be listed twice.
    """

    logits: Float32[Array, "B W S"]  # with bias and penalties
    ids: Int32[Array, "B W S"] | None = None  # None: the whole vocabulary
    total: Float32[Array, "B W"] | None = None  # sum of exp((logit - largest) / temperature); None: that of the list
    spilled: Bool[Array, " B"] | None = None  # requests of whose top-k some token may not be listed

    def best(self) -> Int32[Array, "B W"]:
        """The greedy choice."""
        return best(self.logits, self.ids)

    def distribution(self, sampling: Sampling | None) -> Float32[Array, "B W S"]:
        """Log-probabilities of the listed tokens: -inf where filtered, one-hot for greedy requests."""
        ids = jnp.arange(self.logits.shape[-1]) if self.ids is None else self.ids
        one_hot = jnp.where(self.best()[..., None] == ids, 0.0, -jnp.inf)
        if sampling is None or not sampling.plan.random:
            return one_hot
        scores = filtered(self.logits, sampling)
        if self.total is None:
            log_p = jax.nn.log_softmax(scores, axis=-1)
        else:
            log_p = scores - jnp.log(self.total)[..., None]
        return jnp.where(is_random(sampling), log_p, one_hot)

    def draw(self, positions: Int32[Array, "B W"], sampling: Sampling | None) -> Int32[Array, "B W"]:
        """The target's own token after each row: drawn with its position's noise, or the greedy choice."""
        if sampling is None or not sampling.plan.random:
            return self.best()
        # Unnormalised: without a sum over the vocabulary a score cannot depend on the shape of the batch.
        noisy = filtered(self.logits, sampling) + self.noise(positions, sampling)
        return best(jnp.where(is_random(sampling), noisy, self.logits), self.ids)

    def noise(self, positions: Int32[Array, "B W"], sampling: Sampling) -> Float32[Array, "B W S"]:
        """The noise of the listed tokens."""
        ids = jnp.arange(self.logits.shape[-1], dtype=jnp.int32) if self.ids is None else self.ids
        return gumbel(row_keys(sampling.seed, positions), jnp.broadcast_to(ids, self.logits.shape))

    def of(self, values: Float32[Array, "B N S"], tokens: Int32[Array, "B N"]) -> Float32[Array, "B N"]:
        """The listed values of one token in each of the first N rows, -inf where it is not listed."""
        if self.ids is None:
            return jnp.take_along_axis(values, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
        return jnp.max(jnp.where(self.ids[:, : tokens.shape[1]] == tokens[..., None], values, -jnp.inf), axis=-1)

    def row(self, row: Int32[Array, " B"]) -> "Shortlist":
        """One row of each request, W = 1."""
        each = jnp.arange(row.shape[0])
        ids = None if self.ids is None else self.ids[each, row][:, None]
        return Shortlist(self.logits[each, row][:, None], ids)

    def spread(self, ids: Int32[Array, "B C"], weights: Float32[Array, "B C"]) -> Float32[Array, "B S"]:
        """Weights of the tokens `ids` laid out as the list of a single row; where they are 0 the id does not matter."""
        if self.ids is None:
            batch, _, vocab = self.logits.shape
            places = jnp.where(weights > 0, ids, vocab)
            return (
                jnp.zeros((batch, vocab), weights.dtype)
                .at[jnp.arange(batch)[:, None], places]
                .add(weights, mode="drop")
            )
        return jnp.sum(jnp.where(self.ids[:, 0, :, None] == ids[:, None], weights[:, None], 0.0), axis=-1)


def everything(
    logits: Float32[Array, "B W V"],
    sampling: Sampling | None,
    history: History | None = None,
    tokens: Int32[Array, "B W"] | None = None,
    mask: TokenMask | None = None,
) -> Shortlist:
    """The whole vocabulary, with bias, with the penalties of each row's own history, and masked."""
    logits = adjusted(logits, sampling, history, tokens)
    return Shortlist(logits if mask is None else mask.apply(logits))


def picked(
    head: Head,
    hidden: Float[Array, "B W D"],
    positions: Int32[Array, "B W"],
    sampling: Sampling | None,
    candidates: Int32[Array, "B W-1 C"] | None,
) -> Shortlist:
    """What the kernel picks, for settings that do not need all logits (`SamplingPlan.whole`).

    `candidates` are the tokens that the drafts can have been.
    """
    if sampling is None or not sampling.plan.random:
        top = head.sample(hidden)
        return Shortlist(top.values, top.ids)
    if sampling.plan.slots:
        top = head.sample(hidden, slots=sampling.plan.slots)
        return Shortlist(top.values, top.ids, None, _spilled(top.values, sampling, head.vocab))
    given = None if candidates is None else jnp.pad(candidates, ((0, 0), (0, 1), (0, 0)), constant_values=-1)
    out = head.sample(hidden, given, temperature_of(sampling), row_keys(sampling.seed, positions))
    # The draw is among the tokens that are not given; with those beside it the list has every possible choice.
    columns = (out.values, out.ids), (out.drawn_logits, out.drawn_ids), (out.given, given)
    listed = [(logits, ids) for logits, ids in columns if logits is not None and ids is not None]
    logits, ids = (jnp.concatenate(column, axis=-1) for column in zip(*listed, strict=True))
    return Shortlist(logits, ids, out.total)


def _spilled(values: Array, sampling: Sampling, vocab: int) -> Array | None:
    """Whether the last slot is still in the top-k: then tokens with the same logit may have found no slot."""
    slots = values.shape[-1]
    if slots == vocab:
        return None
    distance = -warm(values, sampling)
    last = jnp.clip(sampling.top_k, 1, slots)[:, None, None] - 1
    radius = jnp.take_along_axis(distance, jnp.broadcast_to(last, (*distance.shape[:2], 1)), axis=-1)[..., 0]
    return jnp.any((distance[..., -1] <= radius) & (sampling.temperature > 0)[:, None], axis=-1)
