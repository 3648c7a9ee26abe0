"""Which tokens may follow each row: no stop token before its request's least length, nothing that breaks a grammar."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32


def words_of(vocab: int) -> int:
    """Words of 32 bits that say which tokens of a vocabulary may come."""
    return -(-vocab // 32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenMask:
    """What is left out of the logits of W rows a request. Every row leaves at least one token.

    early: rows whose token must not be one of `stops`; None: stop tokens may come anywhere.
    words: bit v % 32 of word v // 32 says whether token v may follow the row; None: all may.
    """

    stops: Int32[Array, "B E"]  # -1 is padding
    early: Bool[Array, "B W"] | None = None
    words: UInt32[Array, "B W N"] | None = None

    def apply(self, logits: Float32[Array, "B W V"]) -> Float32[Array, "B W V"]:
        """The logits with -inf for tokens that may not follow. Rows without a restriction keep their numbers."""
        vocab = logits.shape[-1]
        if self.early is not None:
            ends = jnp.any(self.stops[:, :, None] == jnp.arange(vocab), axis=1)
            logits = jnp.where(self.early[..., None] & ends[:, None], -jnp.inf, logits)
        if self.words is not None:
            bits = (self.words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
            allowed = bits.reshape(*bits.shape[:2], -1)[..., :vocab]
            logits = jnp.where(allowed > 0, logits, -jnp.inf)
        return logits
