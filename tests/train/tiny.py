"""Models small enough to train in a test."""

from collections.abc import Callable

import jax
from flax import nnx

from train.target import Architecture

TARGET = Architecture(
    hidden_size=16, periods=1, period=3, num_heads=2, num_kv_heads=1, head_dim=8, delta_k_heads=1, delta_v_heads=2,
    delta_head_dim=8, num_experts=4, expert_size=8, shared_expert_size=8,
)  # fmt: skip


def noisy(build: Callable[[], nnx.Module], seed: int = 1) -> nnx.Module:
    """The module that `build` makes, with all weights far from their tidy initial values; compiled as one program."""

    @jax.jit
    def moved() -> nnx.State:
        leaves, tree = jax.tree.flatten(nnx.state(build()))
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        noise = (0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True))
        return jax.tree.unflatten(tree, [leaf + more for leaf, more in zip(leaves, noise, strict=True)])

    return nnx.merge(nnx.graphdef(nnx.eval_shape(build)), moved())
