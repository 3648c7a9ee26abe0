"""Which drafted tokens stand, and the token after them: speculative sampling that is lossless.

Leviathan et al., arXiv 2211.17192, for drafts with a real distribution. Argmax drafts are
compared with the target's own draw at every row: that accepts just as often, and gives the tokens of plain sampling.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.lax import platform_dependent
from jaxtyping import Array, Float, Int32

from dflash_jax.decoding.masks import TokenMask
from dflash_jax.decoding.noise import uniform
from dflash_jax.decoding.proposal import Candidates, Proposal
from dflash_jax.decoding.sampling import History, Sampling
from dflash_jax.decoding.shortlist import Shortlist, everything, picked
from dflash_jax.models.head import Head
from pallas_kernels.head_sampling import best


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Accepted:
    """The outcome of a round.

    count: rows on the accepted path, the anchor included (1..W); it is also the number of tokens emitted.
    emitted: the accepted drafts, then the bonus token at `count - 1`, then -1.
    """

    count: Int32[Array, " B"]
    emitted: Int32[Array, "B W"]

    @property
    def bonus(self) -> Int32[Array, " B"]:
        """The last emitted token, which is the next anchor."""
        return jnp.take_along_axis(self.emitted, self.count[:, None] - 1, axis=1)[:, 0]


def decide(
    head: Head,
    hidden: Float[Array, "B W D"],
    proposal: Proposal,
    positions: Int32[Array, "B W"],
    sampling: Sampling | None,
    history: History | None,
    mask: TokenMask | None = None,
) -> Accepted:
    """`accept` by the target's logits on the rows of `hidden`, of which no more are made than the settings need.

    A drafted token that the mask leaves out has probability 0, so it is refused as any other, and what follows it is
    never emitted.
    """
    requests = hidden, proposal, positions, sampling

    def by_all(hidden: Array, proposal: Proposal, positions: Array, sampling: Sampling | None) -> Accepted:
        shortlist = everything(head(hidden), sampling, history, proposal.tokens, mask)
        return accept(proposal, shortlist, positions, sampling)

    def by_list(hidden: Array, proposal: Proposal, positions: Array, sampling: Sampling | None) -> Accepted:
        candidates = None if proposal.candidates is None else proposal.candidates.ids
        shortlist = picked(head, hidden, positions, sampling, candidates)
        accepted = accept(proposal, shortlist, positions, sampling)
        if shortlist.spilled is None:
            return accepted
        # One request at a time: this hardly ever happens, and must not reserve memory for the logits of a batch.
        return jax.lax.cond(jnp.any(shortlist.spilled), lambda: jax.lax.map(one, requests), lambda: accepted)

    def one(request: tuple) -> Accepted:
        return jax.tree.map(lambda x: x[0], by_all(*jax.tree.map(lambda x: x[None], request)))

    if mask is not None or (sampling is not None and sampling.plan.whole):
        return by_all(*requests)
    if sampling is None or sampling.plan.slots or not _by_ratio(proposal, sampling):
        return by_list(*requests)
    # A list has the draw after every row, and only one row of each request needs it: noise for the others is cheap
    # beside a second look at the vocabulary, but not on the CPU.
    return platform_dependent(*requests, cpu=by_all, default=by_list)


def _by_ratio(proposal: Proposal, sampling: Sampling | None) -> bool:
    """Whether drafts were drawn, so that their own distribution takes part."""
    drawn = proposal.candidates is not None and proposal.width > 1
    return drawn and sampling is not None and sampling.plan.random


def accept(
    proposal: Proposal, shortlist: Shortlist, positions: Int32[Array, "B W"], sampling: Sampling | None = None
) -> Accepted:
    """Accept the longest prefix of drafts that the target's distribution allows, and add one token of the target's own.

    Row i of `shortlist` and `positions` is about the token after row i of the proposal; positions are absolute.
    """
    if proposal.candidates is not None and sampling is not None and _by_ratio(proposal, sampling):
        return _accept_by_ratio(proposal.tokens, proposal.candidates, shortlist, positions, sampling)
    own = shortlist.draw(positions, sampling)
    count = _prefix(proposal.tokens[:, 1:] == own[:, :-1])
    return Accepted(count=count, emitted=jnp.where(jnp.arange(proposal.width) < count[:, None], own, -1))


def _prefix(stands: Array) -> Array:
    """Rows on the path: the anchor and the drafts before the first that does not stand."""
    return 1 + jnp.sum(jnp.cumprod(stands.astype(jnp.int32), axis=1), axis=1)


def _accept_by_ratio(
    tokens: Array, candidates: Candidates, shortlist: Shortlist, positions: Array, sampling: Sampling
) -> Accepted:
    drafts = tokens[:, 1:]
    log_p = shortlist.distribution(sampling)
    p = jnp.exp(shortlist.of(log_p[:, :-1], drafts))
    q = jnp.sum(jnp.where(candidates.ids == drafts[..., None], candidates.probs, 0.0), axis=-1)
    # Strictly less, so that p = 0 is never accepted; a draft that q cannot have drawn is no draw from q.
    stands = (uniform(sampling.seed, positions[:, :-1]) * q < p) & (q > 0)
    greedy = (sampling.temperature == 0)[:, None]
    count = _prefix((drafts >= 0) & jnp.where(greedy, drafts == shortlist.best()[:, :-1], stands))
    bonus = _last(log_p, shortlist, tokens, candidates, positions, sampling, count - 1)
    rows = jnp.arange(tokens.shape[1])
    shifted = jnp.pad(drafts, ((0, 0), (0, 1)))
    emitted = jnp.where(rows < count[:, None] - 1, shifted, -1)
    return Accepted(count=count, emitted=jnp.where(rows == count[:, None] - 1, bonus[:, None], emitted))


def _last(
    log_p: Array,
    shortlist: Shortlist,
    tokens: Array,
    candidates: Candidates,
    positions: Array,
    sampling: Sampling,
    row: Array,
) -> Array:
    """The token after the path's last row: from max(p - q, 0) where a draft was refused, else from p."""
    width = tokens.shape[1]
    each = jnp.arange(row.shape[0])
    log_p, position, listed = log_p[each, row], positions[each, row], shortlist.row(row)
    draft = jnp.minimum(row, width - 2)
    drafted = (row < width - 1) & (tokens[each, draft + 1] >= 0)
    weights = jnp.where(drafted[:, None], candidates.probs[each, draft], 0.0)
    q = listed.spread(candidates.ids[each, draft], weights)
    residual = jnp.maximum(jnp.exp(log_p) - q, 0.0)
    # p and q can be equal but for rounding; then nothing is left over, and a refusal was an accident of rounding too.
    usable = jnp.any(residual > 0, axis=-1, keepdims=True) & drafted[:, None]
    scores = jnp.where(usable, jnp.log(residual), log_p)
    noise = listed.noise(position[:, None], sampling)[:, 0]
    scores = jnp.where((sampling.temperature > 0)[:, None], scores + noise, log_p)
    return best(scores, None if listed.ids is None else listed.ids[:, 0])
