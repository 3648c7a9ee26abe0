"""Losses over token ids, as sums and weights: what to divide by is known when all parts of a batch are summed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Head = Callable[[Float[Array, "rows D"]], Float[Array, "rows V"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ratio:
    """A weighted sum and the sum of its weights, whose quotient is asked for.

    Both are over the global batch, since jit sees global arrays; those of micro batches are added before dividing. No
    gradient flows through the weight.
    """

    total: Float[Array, "..."]
    weight: Float[Array, "..."]

    @property
    def value(self) -> Float[Array, "..."]:
        """The quotient; 0 where nothing has weight."""
        return self.total / jnp.maximum(jax.lax.stop_gradient(self.weight), 1e-9)


def weighted(values: Float[Array, "*n"], weights: Float[Array, "*n"]) -> Ratio:
    """The weighted mean of all values."""
    return Ratio(jnp.sum(values * weights), jnp.sum(weights))


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
    """Negative log-likelihood and argmax of each row, from logits of `chunk` rows at a time.

    For a head that is trained too; for a frozen one `train.vocabulary` needs a product less.
    """

    def rows(args: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = head(args[0])
        return cross_entropy(logits, args[1]), jnp.argmax(logits, axis=-1)

    return in_chunks(rows, (hidden, labels), chunk)


def decay_weights(counts: Float[Array, "*n W"], gamma: float) -> Float[Array, "*n W"]:
    """Weight exp(-(k - 1) / gamma) of row k >= 1 where it is judged (`counts` is 1); nothing for the anchor's row."""
    k = jnp.arange(counts.shape[-1])
    return counts * jnp.where(k > 0, jnp.exp(-(k - 1) / gamma), 0.0)


def dpace_weights(nll: Float[Array, "*n W"], counts: Float[Array, "*n W"]) -> Float[Array, "*n W"]:
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


def opd_weights(
    correct: Float[Array, "*n W"], counts: Float[Array, "*n W"], decay: float
) -> tuple[Float[Array, "*n W"], Float[Array, "*n W"]]:
    """Draft-OPD (arXiv 2605.29343): what the forward KL of a row weighs, and what its reverse KL does.

    Accepted rows have the forward one, with weight 1; the j-th rejected row of a block, j = 0, 1, ..., has the reverse
    one with weight decay^j.
    """
    kept = accepted(correct, counts) * counts
    rejected = counts - kept
    after = jnp.cumsum(rejected, -1) - rejected
    return kept, rejected * decay**after
