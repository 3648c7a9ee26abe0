"""What a round asks the target to verify."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float32, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """The conditional distribution that each drafted token was really drawn from, given the drafts before it.

    Tokens that are not listed have probability 0. Padding slots have probability 0 and any id.
    """

    ids: Int32[Array, "B W-1 C"]
    probs: Float32[Array, "B W-1 C"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposal:
    """A chain of W rows a sequence: row 0 is the anchor (the last emitted token), rows 1.. are drafted.

    A drafted row of -1 is never accepted, nor is any row after it, so requests of one batch may draft different lengths.
    The choice of where to put -1 may depend on anything but the values of tokens that were drawn at random.
    `candidates` is None when the drafts are an argmax, that is when q is one-hot.
    """

    tokens: Int32[Array, "B W"]
    candidates: Candidates | None = None

    @property
    def width(self) -> int:
        return self.tokens.shape[1]


def plain_proposal(anchor: Int32[Array, " B"]) -> Proposal:
    """Plain decoding: the anchor alone (W = 1), so that a round emits one token."""
    return Proposal(tokens=anchor[:, None])
