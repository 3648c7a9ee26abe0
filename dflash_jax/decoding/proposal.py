"""What a round asks the target to verify."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from dflash_jax.cache import DrafterCache
from dflash_jax.decoding.noise import Purpose, gumbel
from dflash_jax.decoding.sampling import Sampling
from dflash_jax.models.drafter import Drafter, Selector
from dflash_jax.models.target import Target


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """The conditional distribution that each drafted token was really drawn from, given the drafts before it.

    Tokens that are not listed have probability 0. Padding slots have probability 0 and any id.
    """

    ids: Int32[Array, "B drafts C"]
    probs: Float32[Array, "B drafts C"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposal:
    """A chain of W rows a sequence: row 0 is the anchor (the last emitted token), rows 1.. are drafted.

    A drafted row of -1 is never accepted, nor is any row after it: requests of one batch may draft different lengths.
    The choice of where to put -1 may depend on anything but the values of tokens that were drawn at random.
    `candidates` is None when the drafts are an argmax, that is when q is one-hot.
    """

    tokens: Int32[Array, "B W"]
    candidates: Candidates | None = None

    @property
    def width(self) -> int:
        """Rows a sequence, the anchor included."""
        return self.tokens.shape[1]


def plain_proposal(anchor: Int32[Array, " B"]) -> Proposal:
    """Plain decoding: the anchor alone (W = 1), so that a round emits one token."""
    return Proposal(tokens=anchor[:, None])


def propose(
    target: Target,
    drafter: Drafter,
    anchor: Int32[Array, " B"],
    cache: DrafterCache,
    lengths: Int32[Array, " B"],
    sampling: Sampling | None,
    width: int,
    page_table: Int32[Array, "B n"] | None = None,
) -> Proposal:
    """Draft `width - 1` tokens behind the anchor in one pass of the drafter.

    A request whose block would pass the drafter's last position drafts nothing, and so goes on with plain decoding.
    """
    config = drafter.config
    block = jnp.full((anchor.shape[0], width), config.mask_token_id, anchor.dtype).at[:, 0].set(anchor)
    hidden = drafter(drafter.embed(target, block), cache, lengths, page_table)[:, 1:]
    slots = 1 if drafter.selector is None else config.selector_top_k
    top = drafter.head(target.head).sample(hidden, slots=slots)
    if drafter.selector is None:
        drafts, candidates = top.ids[..., 0], None
    else:
        drafts, candidates = select(drafter.selector, top.values, top.ids, hidden, anchor, lengths, sampling)
    inside = (lengths + width <= config.max_position) | (config.max_position == 0)
    drafts = jnp.where(inside[:, None], drafts, -1)
    return Proposal(jnp.concatenate([anchor[:, None], drafts], 1), candidates)


def select(
    selector: Selector,
    scores: Float32[Array, "B W-1 C"],
    ids: Int32[Array, "B W-1 C"],
    hidden: Float32[Array, "B W-1 D"],
    anchor: Int32[Array, " B"],
    lengths: Int32[Array, " B"],
    sampling: Sampling | None,
) -> tuple[Int32[Array, "B W-1"], Candidates | None]:
    """DFlash 2: walk the rows' candidates from the anchor on, each scored by how it follows the one before.

    How each follows each candidate of the row before comes out of one product, so that a step of the walk only looks
    it up. Greedy requests take the best, the others draw at their temperature; then the candidates' probabilities go
    along.
    """
    choose = _chooser(sampling, lengths[:, None] + 1 + jnp.arange(ids.shape[1]), ids.shape[-1])
    first = jnp.broadcast_to(anchor[:, None, None], ids[:, :1].shape)
    follows = selector(jnp.concatenate([first, ids[:, :-1]], 1), ids, hidden)  # [B W-1 C C]
    slot, slots, probs = jnp.zeros_like(anchor), [], []
    for row in range(ids.shape[1]):
        behind = jnp.take_along_axis(follows[:, row], slot[:, None, None], 1)[:, 0]
        slot, q = choose(scores[:, row] + behind, row)
        slots.append(slot)
        probs.append(q)
    drafts = jnp.take_along_axis(ids, jnp.stack(slots, 1)[..., None], 2)[..., 0].astype(anchor.dtype)
    random = sampling is not None and sampling.plan.random
    return drafts, Candidates(ids, jnp.stack(probs, 1)) if random else None


def _chooser(sampling: Sampling | None, positions: Array, slots: int) -> Callable[[Array, int], tuple[Array, Array]]:
    """From a row's scores [B, C] to the chosen slot [B], and the distribution it was drawn from."""
    if sampling is None or not sampling.plan.random:
        return lambda score, row: (jnp.argmax(score, -1), score)
    noise = gumbel(sampling.seed, positions, slots, Purpose.DRAFT)
    sampled = sampling.temperature > 0
    temperature = jnp.where(sampled, sampling.temperature, 1.0)[:, None]

    def choose(score: Array, row: int) -> tuple[Array, Array]:
        warm = score / temperature
        drawn = jnp.argmax(warm + noise[:, row], -1)
        return jnp.where(sampled, drawn, jnp.argmax(score, -1)), jax.nn.softmax(warm, -1)

    return choose
