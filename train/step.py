"""One optimiser step: a pure function of (state, frozen weights, batch), jitted with its state donated."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dflash_jax.errors import InputError
from dflash_jax.sharding import constrain, constrain_state
from train.losses import Ratio

Pytree = Any
Metrics = dict[str, jax.Array]
Loss = Callable[[Pytree, Pytree, Pytree], tuple[Any, dict[str, Any]]]
"""(parameters, frozen weights, batch) -> (loss, metrics). The loss is a number or several `Ratio` to be added, by name;
a number counts as a mean over the batch. Metrics are numbers or `Ratio`."""

NORM_RATE = 0.02  # how fast the running gradient norm follows


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "optimizer", "step", "norm"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds."""

    params: Pytree
    optimizer: Pytree
    step: Int[Array, ""]  # also counts steps that were skipped
    norm: Float[Array, ""]  # running gradient norm; 0 before the first step


def init_state(params: Pytree, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros(()))


def make_step(loss: Loss, optimizer: optax.GradientTransformation, *, parts: int = 1, spike: float = 10.0):
    """step(state, frozen, batch) -> (state, metrics). The state that goes in is donated.

    The batch is worked on in `parts` micro batches, with the result of the whole batch at once: sums are added before
    anything is divided. A step whose loss or gradient is not finite, or whose gradient's norm is more than `spike`
    times the running one (0: any), changes neither parameters nor the optimiser's state; metric "skipped" says so.
    On a mesh, trace it in the mesh's context with a state that is laid out by `dflash_jax.sharding.state_shardings`.
    """

    def step(state: TrainState, frozen: Pytree, batch: Pytree) -> tuple[TrainState, Metrics]:
        value, metrics, gradients = gradients_of(loss, state.params, frozen, batch, parts)
        norm = optax.tree.norm(gradients)
        limit = jnp.where((state.norm > 0) & (spike > 0), spike * state.norm, jnp.inf)
        good = jnp.isfinite(value) & jnp.isfinite(norm) & (norm <= limit)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        made = optax.apply_updates(state.params, updates), optimizer_state
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), made, (state.params, state.optimizer))
        params, optimizer_state = constrain_state(kept)
        numbers = {"loss": value, "gradient_norm": norm, "skipped": 1.0 - good} | metrics
        return TrainState(params, optimizer_state, state.step + 1, _running(state.norm, norm, limit)), numbers

    return jax.jit(step, donate_argnums=0)


def _running(mean: Array, norm: Array, limit: Array) -> Array:
    """Also moved by norms above the limit, up to it: after a lasting rise, steps are taken again before long."""
    moved = mean + NORM_RATE * (jnp.minimum(norm, limit) - mean)
    return jnp.where(jnp.isfinite(norm), jnp.where(mean > 0, moved, norm), mean)


def gradients_of(
    loss: Loss, params: Pytree, frozen: Pytree, batch: Pytree, parts: int = 1
) -> tuple[Float[Array, ""], Metrics, Pytree]:
    """The loss, metrics and gradients of a batch that is worked on in so many parts."""
    terms, metrics, gradients = (_in_parts if parts > 1 else _at_once)(loss, params, frozen, batch, parts)
    value = sum((term.value for term in terms.values()), jnp.zeros(()))
    return value, {name: ratio.value for name, ratio in metrics.items()}, constrain_state(gradients)


def _ratios(found: Any) -> dict[str, Ratio]:
    named = found if isinstance(found, Mapping) else {"loss": found}
    return {name: x if isinstance(x, Ratio) else Ratio(x, jnp.ones(())) for name, x in named.items()}


def _at_once(loss: Loss, params: Pytree, frozen: Pytree, batch: Pytree, _: int) -> tuple[Any, Any, Pytree]:
    def value(params: Pytree) -> tuple[Array, Any]:
        terms, metrics = map(_ratios, loss(params, frozen, batch))
        return sum((term.value for term in terms.values()), jnp.zeros(())), (terms, metrics)

    gradients, (terms, metrics) = jax.grad(value, has_aux=True)(params)
    return terms, metrics, gradients


def _in_parts(loss: Loss, params: Pytree, frozen: Pytree, batch: Pytree, parts: int) -> tuple[Any, Any, Pytree]:
    """Each term's gradient is summed on its own, because its weight over the whole batch is known only at the end.

    They are made one after the other: at once they would take the memory of as many backward passes.
    """

    def of_part(part: Pytree) -> tuple[Any, Any, Pytree]:
        def totals(params: Pytree) -> tuple[dict[str, Array], Any]:
            terms, metrics = map(_ratios, loss(params, frozen, part))
            return {name: term.total for name, term in terms.items()}, (terms, metrics)

        sums, pull, (terms, metrics) = jax.vjp(totals, params, has_aux=True)
        each = dict(zip(sums, jnp.eye(len(sums)), strict=True))
        return terms, metrics, jax.lax.map(lambda one: constrain_state(pull(one)[0]), each)

    cut = split(batch, parts)
    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None), zeros, cut)
    terms, metrics, gradients = total
    shares = 1 / jnp.stack([jnp.maximum(term.weight, 1e-9) for term in terms.values()])
    return terms, metrics, jax.tree.map(lambda each: jnp.tensordot(shares, each, 1), gradients)


def check_parts(batch: int, parts: int, ways: int) -> None:
    """InputError for a batch that micro batches, each spread over so many devices, do not divide."""
    if batch % (ways * parts):
        raise InputError(
            f"the batch is {batch} sequences, which the mesh's data x fsdp = {ways} and {parts} micro batches "
            f"do not divide; give a multiple of {ways * parts}"
        )


def split(batch: Pytree, parts: int) -> Pytree:
    """Micro batches along a new leading axis, each with every `parts`-th sequence, so that no device gives any away.

    Batches by name keep the sequences' numbers in the whole batch, as "row". InputError if the batch does not divide.
    """
    size = max(x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x))
    if size % parts:
        raise InputError(f"a batch of {size} sequences cannot be worked on in {parts} equal parts; give a divisor")
    if isinstance(batch, Mapping):
        batch = {"row": jnp.arange(size), **batch}

    def cut(x: Array) -> Array:
        if not jnp.ndim(x):
            return jnp.broadcast_to(x, (parts,))
        pieces = x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(pieces, None, "batch", "...")

    return jax.tree.map(cut, batch)
