"""Models small enough to train in a test."""

import jax
from flax import nnx

from train.target import Architecture

TARGET = Architecture(
    hidden_size=16, periods=1, period=4, num_heads=2, num_kv_heads=1, head_dim=8, delta_k_heads=1, delta_v_heads=2,
    delta_head_dim=8, num_experts=4, expert_size=8, shared_expert_size=8,
)  # fmt: skip


def noisy(model: nnx.Module, seed: int = 1) -> nnx.Module:
    """The model with all weights far from their tidy initial values."""
    graph, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved))
