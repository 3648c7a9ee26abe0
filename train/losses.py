"""Losses over token ids, with the vocabulary's logits made a few rows at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Head = Callable[[Float[Array, "rows D"]], Float[Array, "rows V"]]


def cross_entropy(logits: Float[Array, "*n V"], labels: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Negative log-likelihood in nats."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def in_chunks(function: Callable, rows: Any, chunk: int) -> Any:
    """`function` of a tree of arrays [rows, ...], `chunk` rows at a time and made again backwards.

    So what the function makes on the way, as logits, exists for `chunk` rows only. `chunk` 0 takes all rows at once,
    which is faster where they fit the memory.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    if not chunk or chunk >= count:
        return function(rows)
    padding = -count % chunk
    pieces = jax.tree.map(
        lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:]), rows
    )
    outputs = jax.lax.map(jax.checkpoint(function), pieces)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], outputs)


def chunked_head(
    head: Head, hidden: Float[Array, "rows D"], labels: Int[Array, "rows"], chunk: int
) -> tuple[Float[Array, "rows"], Int[Array, "rows"]]:
    """Negative log-likelihood and argmax of each row, from logits of `chunk` rows at a time."""

    def rows(args: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = head(args[0])
        return cross_entropy(logits, args[1]), jnp.argmax(logits, axis=-1)

    return in_chunks(rows, (hidden, labels), chunk)


def weighted_mean(values: Float[Array, "*n"], weights: Float[Array, "*n"]) -> Float[Array, ""]:
    """Sum of weights in the denominator: over the whole global batch, since jit sees the global arrays."""
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


def pace_weights(nll: Float[Array, "*n W"], counts: Float[Array, "*n W"]) -> Float[Array, "*n W"]:
    """D-PACE: a row weighs as much as the acceptance length that still depends on it.

    With q = exp(-nll) and s = (q + 1) / 2, the chance to get as far as row m is P_m = s_1 ... s_m, and row j weighs the
    sum of P_m over m >= j. `counts` is 1 where a row is judged; row 0 never is. No gradient flows through the weights.
    """
    likely = jnp.where(counts > 0, 0.5 * jnp.exp(-nll) + 0.5, 1.0)
    reached = jnp.cumprod(likely, -1) * counts
    return jax.lax.stop_gradient(jnp.flip(jnp.cumsum(jnp.flip(reached, -1), -1), -1) * counts)


def accepted(correct: Float[Array, "*n W"], counts: Float[Array, "*n W"]) -> Float[Array, "*n W"]:
    """1 for rows that greedy verification would accept: the row is right, and so are all rows before it."""
    judged = jnp.where(counts > 0, correct, jnp.zeros_like(correct)).at[..., 0].set(1.0)
    return jnp.cumprod(judged, -1).at[..., 0].set(0.0)
