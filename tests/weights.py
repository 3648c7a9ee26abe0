"""Modules with weights of the tests' own, made without what their initialisers draw: a program for every shape."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Leaf = Callable[[tuple[str, ...], np.ndarray], np.ndarray]  # (names on the way to it, its start) -> value


def made(build: Callable[[], nnx.Module], leaf: Leaf) -> Any:
    """The module that `build` makes, with other leaves. Vectors and biases start as in it, matrices as zeros."""
    graph, state = nnx.split(nnx.eval_shape(build))
    flat = list(nnx.to_flat_state(state))
    neutral = [i for i, (path, x) in enumerate(flat) if len(x.shape) == 1 or "base" in path]

    @jax.jit
    def starts() -> dict[int, jax.Array]:
        leaves = jax.tree.leaves(nnx.state(build()))
        return {i: leaves[i] for i in neutral}

    start = starts()
    for i, (path, x) in enumerate(flat):
        value = leaf(tuple(map(str, path)), np.asarray(start[i]) if i in start else np.zeros(x.shape))
        flat[i] = path, x.replace(jnp.asarray(value, x.dtype))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def noisy(build: Callable[[], nnx.Module], seed: int = 3) -> Any:
    """All weights far from their tidy initial values."""
    rng = np.random.default_rng(seed)
    return made(build, lambda names, start: start + 0.3 * rng.normal(size=start.shape))
