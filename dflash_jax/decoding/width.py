"""When to draft: where rows are not free, a round that accepts little costs more than the plain rounds it replaces."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DECAY = 0.7  # of the running average, a drafted round
LONGEST = 32  # plain rounds before drafting is tried again, at most


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Controller:
    """Drafts while that pays, and else tries again after 1, 2, 4, ... plain rounds. Lives on the device."""

    break_even: Float[Array, ""]  # tokens a drafted round must give to be worth its time
    average: Float[Array, ""]  # tokens a drafted round gave, newest first
    wait: Int[Array, ""]  # plain rounds until the next drafted one
    backoff: Int[Array, ""]  # plain rounds after the next round that does not pay

    @classmethod
    def start(cls, break_even: Float[Array, ""]) -> "Controller":
        """Begins with drafting."""
        one = jnp.ones((), jnp.int32)
        return cls(break_even, 2.0 * break_even, 0 * one, one)

    def after_drafted(self, tokens: Float[Array, ""]) -> "Controller":
        """`tokens`: mean over the running requests of what the round gave."""
        average = DECAY * self.average + (1 - DECAY) * tokens
        poor = average < self.break_even
        wait = jnp.where(poor, self.backoff, 0)
        backoff = jnp.where(poor, jnp.minimum(2 * self.backoff, LONGEST), 1)
        return replace(self, average=average, wait=wait, backoff=backoff)

    def after_plain(self) -> "Controller":
        """One plain round less to wait for."""
        return replace(self, wait=self.wait - 1)
