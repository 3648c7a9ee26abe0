"""Counter-based Gumbel noise: a function of a row's key and a token's id alone, the same in every kernel.

Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Token `id` of a row
with key (k0, k1) has the number that `jax.random.bits` gives at index `id` of an array.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def gumbel(keys: UInt32[Array, "*N 2"], ids: Int32[Array, "*N S"]) -> Float32[Array, "*N S"]:
    """Standard Gumbel noise of the tokens `ids`; argmax(log p + noise) is a draw from p."""
    return gumbel_of(threefry(keys[..., :1], keys[..., 1:], ids.astype(jnp.uint32)))


def gumbel_of(bits: UInt32[Array, "*N"]) -> Float32[Array, "*N"]:
    """Uniform bits as Gumbel noise, at most 23 and always finite."""
    # Small u make the large values, which decide: so they are resolved to 2**-32 in probability and not to 2**-23.
    return -jnp.log(-jnp.log1p(-unit(bits)))


def unit(bits: UInt32[Array, "*N"]) -> Float32[Array, "*N"]:
    """Uniform bits as numbers strictly between 0 and 1."""
    # Halves, because not every accelerator turns unsigned numbers into floats. Each is exact, and so is the product:
    # the sum is rounded once, to the nearest float of the whole.
    high, low = (half.astype(jnp.int32).astype(jnp.float32) for half in (bits >> 16, bits & 0xFFFF))
    # 32 bits round to 1.0 at the top, where the noise would be infinite.
    return jnp.minimum((high * 65536.0 + low + 0.5) * 2.0**-32, 1.0 - 2.0**-24)


def threefry(k0: UInt32[Array, "..."], k1: UInt32[Array, "..."], ids: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """32 random bits for each id, under keys that broadcast against the ids."""
    words = k0, k1, k0 ^ k1 ^ jnp.uint32(PARITY)
    x, y = jnp.broadcast_to(k0, jnp.broadcast_shapes(k0.shape, ids.shape)), ids + k1
    for i in range(5):
        for rotation in ROTATIONS[i % 2]:
            x = x + y
            y = ((y << rotation) | (y >> (32 - rotation))) ^ x
        x, y = x + words[(i + 1) % 3], y + words[(i + 2) % 3] + jnp.uint32(i + 1)
    return x ^ y
