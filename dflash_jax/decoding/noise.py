"""Counter-based random numbers: a function of (request seed, absolute position, purpose) and of nothing else.

So what a request draws for a position does not depend on its batch, on the width of the proposal, or on how many rounds
were needed to come there.
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32


class Purpose(enum.IntEnum):
    """What a number is for. Draws that must be independent at one position have different purposes."""

    TARGET = 0  # the token that is emitted, drawn from the target's distribution or from the residual
    DRAFT = 1  # the token that the drafter proposes
    ACCEPT = 2  # the test of a drafted token against min(1, p/q)


def gumbel(
    seed: UInt32[Array, " B"], positions: Int32[Array, "B W"], size: int, purpose: Purpose = Purpose.TARGET
) -> Float32[Array, "B W {size}"]:
    """Standard Gumbel noise for the tokens at `positions`; argmax(log p + noise) is a draw from p."""
    # Small u make the large values, which decide: so they are resolved to 2**-32 in probability and not to 2**-23.
    return -jnp.log(-jnp.log1p(-_unit(seed, positions, size, purpose)))


def uniform(
    seed: UInt32[Array, " B"], positions: Int32[Array, "B W"], purpose: Purpose = Purpose.ACCEPT
) -> Float32[Array, "B W"]:
    """Uniform numbers, strictly between 0 and 1, for the tokens at `positions`."""
    return _unit(seed, positions, 1, purpose)[..., 0]


def _unit(seed: Array, positions: Array, size: int, purpose: Purpose) -> Array:
    def at(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), int(purpose))
        return jax.random.bits(jax.random.fold_in(key, position), (size,), jnp.uint32)

    bits = jax.vmap(jax.vmap(at, in_axes=(None, 0)))(seed, positions)
    # 32 bits round to 1.0 at the top, where the noise would be infinite.
    return jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
