"""Losses behind a frozen head, of which no [rows, vocabulary] array exists: a few rows of logits at a time, once.

A row's loss and its gradient with respect to the row's hidden state come out of one pass, since the head's weight is
not trained: with logits z = h W, that gradient is (dloss/dz) W^T, a row of D numbers that is kept until the backward
pass scales it. That is two products with the vocabulary, where making the logits again would take three. On a mesh each
device has its part of the vocabulary; maxima and sums are combined over the parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dflash_jax.models.head import Head
from dflash_jax.sharding import Axes, mesh_axes, per_shard, position, total
from pallas_kernels.head_sampling import Projection, best, logits
from train.losses import in_chunks

LOGITS = 1 << 21  # numbers of logits at a time on a device, where no chunk is asked for
FEWEST = 256  # rows at a time, so that products stay efficient with large vocabularies


@dataclass(frozen=True)
class Options:
    """What is fixed when a program is made."""

    projections: tuple[Projection, ...]  # of the drafter's logits, and of the target's where they are compared
    chunk: int
    top: int = 1
    learn_top: bool = False


def token_scores(
    head: Head,
    hidden: Float[Array, "B A W D"],
    labels: Int[Array, "B A W"],
    raised: Float[Array, "V"] | None = None,
    *,
    chunk: int = 0,
    top: int = 1,
    learn_top: bool = False,
) -> tuple[Float[Array, "B A W"], Float[Array, "B A W k"], Int[Array, "B A W k"]]:
    """Negative log-likelihood of the labels; the `top` largest logits and their ids, ties to the lowest id.

    Gradients go to `hidden`, through the likelihood and, if `learn_top`, through the largest logits; never to the head.
    `raised` is added to the logits that the likelihood is made of; it has to be 0 for labels. `chunk` is how many rows
    of logits exist at a time; 0 chooses.
    """
    options = Options((head.projection,), chunk, top, learn_top)
    return _scores(options, hidden, jax.lax.stop_gradient(head.weight), labels, raised)


def token_distances(
    drafter: Head, target: Head, hidden: Float[Array, "B A W D"], taught: Float[Array, "B A W D"], *, chunk: int = 0
) -> tuple[Float[Array, "B A W"], Float[Array, "B A W"]]:
    """KL(target || drafter) and KL(drafter || target) of the next token, in nats; gradients go to `hidden` alone.

    Both heads have the same weight; `taught` are the target's hidden states.
    """
    options = Options((drafter.projection, target.projection), chunk)
    return _distances(options, hidden, jax.lax.stop_gradient(taught), jax.lax.stop_gradient(target.weight))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(
    options: Options, hidden: Array, weight: Array, labels: Array, raised: Array | None
) -> tuple[Array, Array, Array]:
    run = _each_shard(partial(_local_scores, options, False), options, 3, more=[("vocab",)])
    return run(hidden, weight, labels, raised)


def _scores_forward(
    options: Options, hidden: Array, weight: Array, labels: Array, raised: Array | None
) -> tuple[Any, Any]:
    run = _each_shard(partial(_local_scores, options, True), options, 4, more=[("vocab",)])
    *out, slope = run(hidden, weight, labels, raised)
    return tuple(out), (slope, weight, *out[1:])


def _scores_backward(options: Options, saved: tuple[Array, ...], given: tuple[Array, ...]) -> tuple[Any, ...]:
    slope, weight, values, ids = saved
    gradient = given[0][..., None].astype(slope.dtype) * slope
    if options.learn_top:
        run = _each_shard(partial(_local_top_gradient, options), options, 1, of_weight=2)
        more = run(given[1] * _slope(options.projections[0], values), ids, weight)
        gradient = gradient + more.astype(slope.dtype)
    return gradient, None, None, None


_scores.defvjp(_scores_forward, _scores_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distances(options: Options, hidden: Array, taught: Array, weight: Array) -> tuple[Array, Array]:
    return _each_shard(partial(_local_distances, options, False), options, 2, of_weight=2)(hidden, taught, weight)


def _distances_forward(options: Options, hidden: Array, taught: Array, weight: Array) -> tuple[Any, Any]:
    run = _each_shard(partial(_local_distances, options, True), options, 4, of_weight=2)
    forward, reverse, *slopes = run(hidden, taught, weight)
    return (forward, reverse), tuple(slopes)


def _distances_backward(options: Options, saved: tuple[Array, ...], given: tuple[Array, ...]) -> tuple[Any, ...]:
    parts = (g[..., None].astype(slope.dtype) * slope for g, slope in zip(given, saved, strict=True))
    return sum(parts), None, None


_distances.defvjp(_distances_forward, _distances_backward)


def _each_shard(
    function: Callable[..., Any], options: Options, outputs: int, of_weight: int = 1, more: Sequence[Axes] = ()
) -> Callable[..., Any]:
    """`function` of two arrays by row, the weight and `more`, on each device's own rows and part of the vocabulary."""
    rows: Any = ("batch",)
    inputs = [rows, rows, *more]
    inputs.insert(of_weight, ("vocab", None) if options.projections[0].layout == "vd" else (None, "vocab"))
    return per_shard(function, inputs, (rows,) * outputs if outputs > 1 else rows)


def _local_scores(
    options: Options, slopes: bool, hidden: Array, weight: Array, labels: Array, raised: Array | None
) -> tuple[Array, ...]:
    (projection,), weight = options.projections, weight.astype(hidden.dtype)

    def of_rows(rows: tuple[Array, Array]) -> tuple[Array, ...]:
        x, label = rows
        z = logits(projection, x, weight)
        mine = label - position("vocab") * z.shape[-1]
        here = mine[:, None] == jnp.arange(z.shape[-1])
        p, log_sum = _softmax(z if raised is None else z + raised)
        nll = log_sum - total(jnp.sum(jnp.where(here, z, 0.0), -1), "vocab")
        out = (nll, *_top(z, options.top))
        return (*out, _to_hidden(projection, jnp.where(here, p - 1, p), z, weight, x.dtype)) if slopes else out

    return _by_rows(of_rows, (hidden, labels), options, weight)


def _local_distances(options: Options, slopes: bool, hidden: Array, taught: Array, weight: Array) -> tuple[Array, ...]:
    (own, other), weight = options.projections, weight.astype(hidden.dtype)

    def of_rows(rows: tuple[Array, Array]) -> tuple[Array, ...]:
        z, t = logits(own, rows[0], weight), logits(other, rows[1].astype(hidden.dtype), weight)
        (q, q_sum), (p, p_sum) = _softmax(z), _softmax(t)
        gap = (z - q_sum[:, None]) - (t - p_sum[:, None])  # log q - log p
        forward, reverse = total(-jnp.sum(p * gap, -1), "vocab"), total(jnp.sum(q * gap, -1), "vocab")
        if not slopes:
            return forward, reverse
        of_logits = q - p, q * (gap - reverse[:, None])
        return forward, reverse, *(_to_hidden(own, d, z, weight, hidden.dtype) for d in of_logits)

    return _by_rows(of_rows, (hidden, taught), options, weight)


def _local_top_gradient(options: Options, given: Array, ids: Array, weight: Array) -> Array:
    """Sum over the top tokens of what is given for each times the token's column of the head."""
    (projection,) = options.projections
    table = weight if projection.layout == "vd" else weight.T  # [V D]

    def of_rows(rows: tuple[Array, Array]) -> tuple[Array]:
        given, ids = rows
        mine = ids - position("vocab") * len(table)
        here = (mine >= 0) & (mine < len(table))
        columns = table[jnp.where(here, mine, 0)]
        out = jnp.einsum(
            "rk,rkd->rd", jnp.where(here, given, 0).astype(table.dtype), columns, preferred_element_type=jnp.float32
        )
        return (total(out, "vocab"),)

    return _by_rows(of_rows, (given, ids), options, weight)[0]


def _by_rows(function: Callable[..., Any], arrays: tuple[Array, Array], options: Options, weight: Array) -> Any:
    """`function` of the rows behind the axes B, A, W of both arrays, some rows at a time."""
    shape = arrays[0].shape[:3]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), arrays)
    vocab = options.projections[0].sizes(weight)[1]
    out = in_chunks(function, flat, options.chunk or max(FEWEST, LOGITS // vocab))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), out)


def _softmax(z: Float[Array, "r V"]) -> tuple[Float[Array, "r V"], Float[Array, "r"]]:
    """Probabilities of this device's tokens, and the log-sum-exp over all tokens."""
    axes, most = mesh_axes("vocab"), jnp.max(z, -1)
    most = jax.lax.pmax(most, axes) if axes else most
    e = jnp.exp(z - most[:, None])
    mass = total(jnp.sum(e, -1), "vocab")
    return e / mass[:, None], most + jnp.log(mass)


def _top(z: Float[Array, "r V"], count: int) -> tuple[Float[Array, "r k"], Int[Array, "r k"]]:
    """The largest logits of the whole vocabulary and their ids."""
    axes, own = mesh_axes("vocab"), min(count, z.shape[-1])
    values, ids = (jnp.max(z, -1)[:, None], best(z)[:, None]) if count == 1 else jax.lax.top_k(z, own)
    ids = ids + position("vocab") * z.shape[-1]
    if not axes:
        return values, ids
    values, ids = (jnp.moveaxis(jax.lax.all_gather(x, axes), 0, 1).reshape(len(z), -1) for x in (values, ids))
    values, at = jax.lax.top_k(values, count)
    return values, jnp.take_along_axis(ids, at, -1)


def _slope(projection: Projection, z: Array) -> Array | float:
    """Of the logits, with respect to the products that they are made of."""
    cap = projection.soft_cap
    return projection.multiplier * (1.0 if cap is None else 1 - (z / cap) ** 2)


def _to_hidden(projection: Projection, of_logits: Array, z: Array, weight: Array, dtype: Any) -> Float[Array, "r D"]:
    """The gradient with respect to the hidden rows, from that with respect to the logits z."""
    given = (of_logits * _slope(projection, z)).astype(dtype)
    equation = "rv,dv->rd" if projection.layout == "dv" else "rv,vd->rd"
    return total(jnp.einsum(equation, given, weight, preferred_element_type=jnp.float32), "vocab").astype(dtype)
