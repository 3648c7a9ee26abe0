"""Which drafted tokens stand, and the token after them: speculative sampling that is lossless.

Leviathan et al., arXiv 2211.17192, for drafts with a real distribution. Argmax drafts are
compared with the target's own draw at every row: that accepts just as often, and gives the tokens of plain sampling.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from dflash_jax.decoding.noise import gumbel, uniform
from dflash_jax.decoding.proposal import Candidates, Proposal
from dflash_jax.decoding.sampling import History, Sampling, adjusted, best, distribution, draw


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


def accept(
    proposal: Proposal,
    logits: Float32[Array, "B W V"],
    positions: Int32[Array, "B W"],
    sampling: Sampling | None = None,
    history: History | None = None,
) -> Accepted:
    """Accept the longest prefix of drafts that the target's distribution allows, and add one token of the target's own.

    Row i of `logits` and `positions` is about the token after row i of the proposal; positions are absolute.
    `history` is needed when `sampling.plan.penalties`.
    """
    if proposal.candidates is not None and proposal.width > 1 and sampling is not None and sampling.plan.random:
        return _accept_by_ratio(proposal.tokens, proposal.candidates, logits, positions, sampling, history)
    own = draw(logits, positions, sampling, history, proposal.tokens)
    count = _prefix(proposal.tokens[:, 1:] == own[:, :-1])
    return Accepted(count=count, emitted=jnp.where(jnp.arange(proposal.width) < count[:, None], own, -1))


def _prefix(stands: Array) -> Array:
    """Rows on the path: the anchor and the drafts before the first that does not stand."""
    return 1 + jnp.sum(jnp.cumprod(stands.astype(jnp.int32), axis=1), axis=1)


def _accept_by_ratio(
    tokens: Array, candidates: Candidates, logits: Array, positions: Array, sampling: Sampling, history: History | None
) -> Accepted:
    drafts = tokens[:, 1:]
    log_p = distribution(logits, sampling, history, tokens)
    p = jnp.exp(jnp.take_along_axis(log_p[:, :-1], jnp.maximum(drafts, 0)[..., None], axis=-1)[..., 0])
    q = jnp.sum(jnp.where(candidates.ids == drafts[..., None], candidates.probs, 0.0), axis=-1)
    # Strictly less, so that p = 0 is never accepted; a draft that q cannot have drawn is no draw from q.
    stands = (uniform(sampling.seed, positions[:, :-1]) * q < p) & (q > 0)
    own = best(adjusted(logits[:, :-1], sampling, history, tokens[:, :-1]))
    greedy = (sampling.temperature == 0)[:, None]
    count = _prefix((drafts >= 0) & jnp.where(greedy, drafts == own, stands))
    bonus = _last(log_p, tokens, candidates, positions, sampling, count - 1)
    rows = jnp.arange(tokens.shape[1])
    shifted = jnp.pad(drafts, ((0, 0), (0, 1)))
    emitted = jnp.where(rows < count[:, None] - 1, shifted, -1)
    return Accepted(count=count, emitted=jnp.where(rows == count[:, None] - 1, bonus[:, None], emitted))


def _last(
    log_p: Array, tokens: Array, candidates: Candidates, positions: Array, sampling: Sampling, row: Array
) -> Array:
    """The token after the path's last row: from max(p - q, 0) where a draft was refused, else from p."""
    batch, width, vocab = log_p.shape
    each = jnp.arange(batch)
    log_p, position = log_p[each, row], positions[each, row]
    draft = jnp.minimum(row, width - 2)
    drafted = (row < width - 1) & (tokens[each, draft + 1] >= 0)
    weight = jnp.where(drafted[:, None], candidates.probs[each, draft], 0.0)
    ids = jnp.where(weight > 0, candidates.ids[each, draft], vocab)
    q = jnp.zeros((batch, vocab), log_p.dtype).at[each[:, None], ids].add(weight, mode="drop")
    residual = jnp.maximum(jnp.exp(log_p) - q, 0.0)
    # p and q can be equal but for rounding; then nothing is left over, and a refusal was an accident of rounding too.
    usable = jnp.any(residual > 0, axis=-1, keepdims=True) & drafted[:, None]
    scores = jnp.where(usable, jnp.log(residual), log_p)
    noise = gumbel(sampling.seed, position[:, None], vocab)[:, 0]
    scores = jnp.where((sampling.temperature > 0)[:, None], scores + noise, log_p)
    return best(scores)
