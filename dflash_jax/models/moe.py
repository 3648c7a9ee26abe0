"""Mixture of experts: router, routed experts, and the shared expert of Qwen3-Next and Qwen3.5."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax.config import MoeConfig
from dflash_jax.models.layers import MLP, linear, product, side_by_side, swiglu
from dflash_jax.sharding import per_shard, position, total
from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_matmul import gpu, grouped_matmul, grouped_pair


def clamped_swiglu(gate: Array, up: Array, limit: float) -> Array:
    """The activation of gpt-oss: (up + 1) * gate * sigmoid(1.702 gate), both clamped."""
    gate = jnp.minimum(gate, limit)
    return (jnp.clip(up, -limit, limit) + 1) * gate * jax.nn.sigmoid(1.702 * gate)


def activate(moe: MoeConfig, h: Float[Array, "... 2 F"]) -> Float[Array, "... F"]:
    """The experts' activation."""
    gate, up = h[..., 0, :], h[..., 1, :]
    return swiglu(gate, up) if moe.swiglu_limit is None else clamped_swiglu(gate, up, moe.swiglu_limit)


class Experts(nnx.Module):
    """E expert MLPs in stacked arrays: gate_up [E, 2, in, F], down [E, F, out].

    Accelerators tile the last two axes: [E, in, 2, F] had to be copied whole before every product.
    Of few experts (see `DenseExperts`) gate_up is [in, E, 2, F].
    """

    def __init__(self, dim: int, moe: MoeConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.moe = moe
        init, E, F = nnx.initializers.normal(0.02), moe.num_experts, moe.intermediate_size
        leading = (dim, E, 2) if moe.dense else (E, 2, dim)
        into = ("embed", "experts", None) if moe.dense else ("experts", None, "embed")
        axes = (*into, "mlp"), ("experts", "mlp", "embed"), ("experts", None, "mlp"), ("experts", None)
        self.gate_up = nnx.Param(init(rngs.params(), (*leading, F), dtype), axes=axes[0])
        self.down = nnx.Param(init(rngs.params(), (E, F, dim), dtype), axes=axes[1])
        self.gate_up_bias = nnx.Param(jnp.zeros((E, 2, F), dtype), axes=axes[2]) if moe.bias else None
        self.down_bias = nnx.Param(jnp.zeros((E, dim), dtype), axes=axes[3]) if moe.bias else None

    def __call__(
        self, x: Float[Array, "R D"], chosen: Int[Array, "R k"], weights: Float[Array, "R k"]
    ) -> Float[Array, "R D"]:
        """Sum over each row's chosen experts, weighted.

        Every device has all rows of its part of the batch, computes its own experts' columns, and adds up.
        """
        params = [self.gate_up, self.down, self.gate_up_bias, self.down_bias]
        given = [None if p is None else p[...] for p in params]
        gate_up = (None, "experts", None, "mlp") if self.moe.dense else ("experts", None, None, "mlp")
        rows = ("batch", None)
        inputs = [rows, rows, rows, gate_up, ("experts", "mlp", None), ("experts", None, "mlp"), ("experts", None)]
        return per_shard(self._own, inputs, rows)(x, chosen, weights, *given)

    def _own(
        self, x: Array, chosen: Array, weights: Array, gate_up: Array, down: Array, bias: Any, after: Any
    ) -> Array:
        """What the experts (and their columns) that this device has add to the rows."""
        if after is not None:  # once, not in every shard of the columns
            after = jnp.where(position("mlp") == 0, after, 0)
        mine = chosen - position("experts") * len(down)
        weights = weights.astype(x.dtype)
        out = self._product(x, mine, weights, gate_up, down, bias, after)
        return total(out, "experts", "mlp")

    def _product(self, x: Array, chosen: Array, weights: Array, *params: Any) -> Array:
        """`chosen` counts from the first of the E experts here; others are below 0 or above E - 1.

        Rows are grouped by expert; few rows on the CPU take each their own experts, which reads no others.
        """
        here = (chosen >= 0) & (chosen < len(params[1]))
        few = chosen.size <= len(params[1])
        kernel = all(gpu.takes(x, p) for p in params[:2])
        return dispatch(
            None, x, chosen, jnp.where(here, weights, 0), here, *params,
            reference=_gathered if few else _grouped, tpu=_grouped, gpu=_slotted if kernel else _grouped, moe=self.moe,
        )  # fmt: skip


class DenseExperts(Experts):
    """Few experts: all of them for every row, as two plain products; so the first one's kernel is [in, E, 2, F]."""

    def _product(self, x: Array, chosen: Array, weights: Array, *params: Any) -> Array:
        gate_up, down = (p.astype(x.dtype) for p in params[:2])
        bias, after = (None if p is None else p.astype(x.dtype) for p in params[2:])
        one_hot = jax.nn.one_hot(chosen, len(down), dtype=x.dtype)  # all 0 for an expert that is not here
        share = jnp.sum(one_hot * weights[..., None], 1)  # [R E]
        h = product(x, gate_up.reshape(x.shape[1], -1)).reshape(len(x), *gate_up.shape[1:])
        h = h if bias is None else h + bias
        h = side_by_side(activate(self.moe, h) * share[..., None])
        y = product(h, down.reshape(h.shape[1], -1))
        return y if after is None else y + share @ after


def _gathered(
    x: Array, chosen: Array, weights: Array, here: Array, gate_up: Array, down: Array, bias: Any, after: Any,
    *, moe: MoeConfig,
) -> Array:  # fmt: skip
    """Each row's own expert matrices, gathered."""
    chosen = jnp.where(here, chosen, 0)
    h = jnp.matmul(x[:, None, None, None], gate_up[chosen].astype(x.dtype))[..., 0, :]  # [R k 2 F]
    h = h if bias is None else h + bias[chosen].astype(x.dtype)
    y = jnp.matmul(activate(moe, h)[:, :, None], down[chosen].astype(x.dtype))[:, :, 0]
    y = y if after is None else y + after[chosen].astype(x.dtype)
    return jnp.sum(y * weights[..., None], 1)


def _grouped(
    x: Array, chosen: Array, weights: Array, here: Array, gate_up: Array, down: Array, bias: Any, after: Any,
    *, moe: MoeConfig,
) -> Array:  # fmt: skip
    """Rows sorted by expert, those of no expert here at the end; one product a group."""
    (rows, k), E = chosen.shape, len(down)
    flat = jnp.where(here, chosen, E).reshape(-1)
    order = jnp.argsort(flat)
    expert, sizes = flat[order], jnp.bincount(flat, length=E)
    h = grouped_pair(x[order // k], gate_up.astype(x.dtype), sizes)
    h = h if bias is None else h + bias[jnp.minimum(expert, E - 1)].astype(x.dtype)
    y = grouped_matmul(activate(moe, h), down.astype(x.dtype), sizes)
    y = y if after is None else y + after[jnp.minimum(expert, E - 1)].astype(x.dtype)
    y = jnp.where((expert < E)[:, None], y * weights.reshape(-1)[order][:, None], 0)
    # Gathered and not scattered: scattered rows are added up in any order on a GPU, and one by one on a TPU.
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    return jnp.sum(y[place].reshape(rows, k, -1), 1)


def _slotted(
    x: Array, chosen: Array, weights: Array, here: Array, gate_up: Array, down: Array, bias: Any, after: Any,
    *, moe: MoeConfig,
) -> Array:  # fmt: skip
    """Rows where the GPU's kernel wants them."""
    (rows, k), E = chosen.shape, len(down)
    expert = jnp.where(here, chosen, E).reshape(-1)
    slots = gpu.Slots.of(expert, E)
    own = jnp.minimum(expert, E - 1)[slots.source]
    h = slots.product(x[slots.source // k], gate_up)
    h = h if bias is None else h + bias[own].astype(x.dtype)
    y = slots.product(activate(moe, h), down[:, None])[:, 0]
    y = y if after is None else y + after[own].astype(x.dtype)
    y = y[slots.slots].reshape(rows, k, -1) * weights[..., None]
    return jnp.sum(jnp.where(here[..., None], y, 0), 1)


class MoE(nnx.Module):
    """Routed experts, and the shared expert behind its gate where there is one."""

    def __init__(self, dim: int, moe: MoeConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.moe = moe
        self.router = linear(dim, moe.num_experts, ("embed", None), bias=moe.bias, dtype=dtype, rngs=rngs)
        experts = DenseExperts if moe.dense else Experts
        self.experts = experts(dim, moe, dtype=dtype, rngs=rngs)
        shared = moe.shared_intermediate_size
        self.shared = MLP(dim, shared, dtype=dtype, rngs=rngs) if shared else None
        self.shared_gate = linear(dim, 1, ("embed", None), dtype=dtype, rngs=rngs) if shared else None

    def route(self, x: Float[Array, "R D"]) -> tuple[Int[Array, "R k"], Float[Array, "R k"], Float[Array, "R E"]]:
        """Chosen experts (ties to the lowest id), their weights, and the router's logits."""
        logits = self.router(x).astype(jnp.float32)
        if self.moe.softmax_after_topk:
            values, chosen = jax.lax.top_k(logits, self.moe.top_k)
            return chosen, jax.nn.softmax(values, -1), logits
        values, chosen = jax.lax.top_k(jax.nn.softmax(logits, -1), self.moe.top_k)
        if self.moe.norm_topk:
            values = values / values.sum(-1, keepdims=True)
        return chosen, values, logits

    def __call__(self, x: Float[Array, "B W D"]) -> tuple[Float[Array, "B W D"], Float[Array, "R E"]]:
        """The mixture's output, and the router's logits (for the balance loss of training)."""
        rows = x.reshape(-1, x.shape[-1])
        chosen, weights, logits = self.route(rows)
        out = self.experts(rows, chosen, weights)
        if self.shared is not None and self.shared_gate is not None:
            out = out + jax.nn.sigmoid(self.shared_gate(rows)) * self.shared(rows)
        return out.reshape(x.shape), logits
