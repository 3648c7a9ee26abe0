"""Attention to some keys at a time: sums of weighted values, which can be added up before they are averaged."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

HIDDEN = -1e30  # a finite score: a row without any visible key stays finite


class Sums(NamedTuple):
    """Attention to some keys, before the weights are made to add up to 1; fp32."""

    top: Float[Array, "B K G W"]  # the highest score
    total: Float[Array, "B K G W"]  # of the weights, exp(score - top)
    out: Float[Array, "B K G W H"]  # values times weights


def by_key_head(q: Float[Array, "B W N H"], kv_heads: int) -> Float[Array, "B K G W H"]:
    """Queries by the key head that they go with."""
    B, W, N, H = q.shape
    return q.reshape(B, W, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 1, 4)


def summed(
    q: Float[Array, "B K G W H"], keys: Array, values: Array, mask: Bool[Array, "B W S"], scale: float,
    soft_cap: float | None,
) -> Sums:  # fmt: skip
    """Attention to keys and values [B K S H], of which row w sees mask [B W S]."""
    B, K, G, W, H = q.shape
    # Keys on the left: with them on the right the CPU packs the whole cache anew (4x slower at 512 positions), and so
    # it does where XLA may put the axes in order within the product.
    x = jnp.einsum("bksh,bkrh->bksr", keys, q.reshape(B, K, G * W, H), preferred_element_type=jnp.float32)
    x = jax.lax.optimization_barrier(x).swapaxes(2, 3) * scale
    x = x if soft_cap is None else soft_cap * jnp.tanh(x / soft_cap)
    x = jnp.where(mask[:, None, None], x.reshape(B, K, G, W, -1), HIDDEN)
    top = jax.lax.stop_gradient(jnp.max(x, -1))
    weights = jnp.exp(x - top[..., None])
    taken = weights.reshape(B, K, G * W, -1).astype(values.dtype)
    out = jnp.einsum("bkrs,bksh->bkrh", taken, values, preferred_element_type=jnp.float32)
    return Sums(top, jnp.sum(weights, -1), out.reshape(q.shape))


def merged(a: Sums, b: Sums) -> Sums:
    """Attention to the keys of both."""
    top = jnp.maximum(a.top, b.top)
    of_a, of_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Sums(top, a.total * of_a + b.total * of_b, a.out * of_a[..., None] + b.out * of_b[..., None])


def averaged(sums: Sums, sinks: Float[Array, "N"] | None) -> Float[Array, "B W N H"]:
    """The values' weighted mean; a sink takes its share of the weight and has no value."""
    B, K, G, W, H = sums.out.shape
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, K, G, 1), sums.top.shape)
        sums = merged(sums, Sums(sink, jnp.ones_like(sink), jnp.zeros_like(sums.out)))
    return (sums.out / sums.total[..., None]).transpose(0, 3, 1, 2, 4).reshape(B, W, K * G, H)
