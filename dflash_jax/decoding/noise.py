"""Counter-based random numbers: a function of (request seed, absolute position, purpose) and of nothing else.

So what a request draws for a position does not depend on its batch, on the width of the proposal, or on how many rounds
were needed to come there.
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from pallas_kernels.head_sampling import noise


class Purpose(enum.IntEnum):
    """What a number is for. Draws that must be independent at one position have different purposes."""

    TARGET = 0  # the token that is emitted, drawn from the target's distribution or from the residual
    DRAFT = 1  # the token that the drafter proposes
    ACCEPT = 2  # the test of a drafted token against min(1, p/q)


def row_keys(
    seed: UInt32[Array, " B"], positions: Int32[Array, "B W"], purpose: Purpose = Purpose.TARGET
) -> UInt32[Array, "B W 2"]:
    """The keys of the numbers for the tokens at `positions`, as the kernels take them."""

    def at(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), int(purpose))
        return jax.random.key_data(jax.random.fold_in(key, position))

    return jax.vmap(jax.vmap(at, in_axes=(None, 0)))(seed, positions)


def gumbel(
    seed: UInt32[Array, " B"], positions: Int32[Array, "B W"], size: int, purpose: Purpose = Purpose.TARGET
) -> Float32[Array, "B W {size}"]:
    """Standard Gumbel noise for the tokens at `positions`; argmax(log p + noise) is a draw from p."""
    ids = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (*positions.shape, size))
    return noise.gumbel(row_keys(seed, positions, purpose), ids)


def uniform(
    seed: UInt32[Array, " B"], positions: Int32[Array, "B W"], purpose: Purpose = Purpose.ACCEPT
) -> Float32[Array, "B W"]:
    """Uniform numbers, strictly between 0 and 1, for the tokens at `positions`."""
    keys = row_keys(seed, positions, purpose)
    return noise.unit(noise.threefry(keys[..., 0], keys[..., 1], jnp.zeros((), jnp.uint32)))
