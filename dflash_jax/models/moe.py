"""Mixture of experts: router, routed experts, and the shared expert of Qwen3-Next and Qwen3.5."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax.config import MoeConfig
from dflash_jax.models.layers import MLP, linear, swiglu


def clamped_swiglu(gate: Array, up: Array, limit: float) -> Array:
    """The activation of gpt-oss: (up + 1) * gate * sigmoid(1.702 gate), both clamped."""
    gate = jnp.minimum(gate, limit)
    return (jnp.clip(up, -limit, limit) + 1) * gate * jax.nn.sigmoid(1.702 * gate)


def activate(moe: MoeConfig, h: Float[Array, "... 2 F"]) -> Float[Array, "... F"]:
    """The experts' activation."""
    gate, up = h[..., 0, :], h[..., 1, :]
    return swiglu(gate, up) if moe.swiglu_limit is None else clamped_swiglu(gate, up, moe.swiglu_limit)


class Experts(nnx.Module):
    """E expert MLPs in stacked arrays [E, in, out]; of few (see `DenseExperts`) gate_up is [in, E, 2, F]."""

    def __init__(self, dim: int, moe: MoeConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.moe = moe
        init, E, F = nnx.initializers.normal(0.02), moe.num_experts, moe.intermediate_size
        leading = (dim, E) if moe.dense else (E, dim)
        self.gate_up = nnx.Param(init(rngs.params(), (*leading, 2, F), dtype))
        self.down = nnx.Param(init(rngs.params(), (E, F, dim), dtype))
        self.gate_up_bias = nnx.Param(jnp.zeros((E, 2, F), dtype)) if moe.bias else None
        self.down_bias = nnx.Param(jnp.zeros((E, dim), dtype)) if moe.bias else None

    def __call__(
        self, x: Float[Array, "R D"], chosen: Int[Array, "R k"], weights: Float[Array, "R k"]
    ) -> Float[Array, "R D"]:
        """Sum over each row's chosen experts, weighted.

        Few rows: only the chosen experts are read. Else rows are grouped by expert.
        """
        few = chosen.size <= self.moe.num_experts
        return self._gathered(x, chosen, weights) if few else self._grouped(x, chosen, weights)

    def _gathered(self, x: Array, chosen: Array, weights: Array) -> Array:
        """Each row's own expert matrices, gathered."""
        kernel = self.gate_up[...][chosen].astype(x.dtype)  # [R k D 2 F]
        h = jnp.matmul(x[:, None, None], kernel.reshape(*kernel.shape[:-2], -1)).reshape(
            *chosen.shape, *kernel.shape[-2:]
        )
        if self.gate_up_bias is not None:
            h = h + self.gate_up_bias[...][chosen]
        y = jnp.matmul(activate(self.moe, h)[:, :, None], self.down[...][chosen].astype(x.dtype))[:, :, 0]
        if self.down_bias is not None:
            y = y + self.down_bias[...][chosen]
        return jnp.sum(y * weights[..., None].astype(x.dtype), 1)

    def _grouped(self, x: Array, chosen: Array, weights: Array) -> Array:
        """Rows sorted by expert, one product a group."""
        rows, k = chosen.shape
        flat = chosen.reshape(-1)
        order = jnp.argsort(flat)
        expert, sizes = flat[order], jnp.bincount(flat, length=self.moe.num_experts)
        gate_up, down = self.gate_up[...].astype(x.dtype), self.down[...].astype(x.dtype)
        h = jax.lax.ragged_dot(x[order // k], gate_up.reshape(*gate_up.shape[:2], -1), sizes)
        h = h.reshape(-1, *gate_up.shape[2:])
        if self.gate_up_bias is not None:
            h = h + self.gate_up_bias[...][expert]
        y = jax.lax.ragged_dot(activate(self.moe, h), down, sizes)
        if self.down_bias is not None:
            y = y + self.down_bias[...][expert]
        y = y * weights.reshape(-1)[order][:, None].astype(x.dtype)
        return jnp.zeros((rows, x.shape[1]), x.dtype).at[order // k].add(y)


class DenseExperts(Experts):
    """Few experts: all of them for every row, as two plain products; so the first one's kernel is [in, E, 2, F]."""

    def __call__(
        self, x: Float[Array, "R D"], chosen: Int[Array, "R k"], weights: Float[Array, "R k"]
    ) -> Float[Array, "R D"]:
        """Sum over each row's chosen experts, weighted; the others' weight is 0."""
        rows, gate_up = len(x), self.gate_up[...].astype(x.dtype)
        one_hot = jax.nn.one_hot(chosen, self.moe.num_experts, dtype=x.dtype)
        share = jnp.sum(one_hot * weights[..., None].astype(x.dtype), 1)  # [R E]
        h = (x @ gate_up.reshape(x.shape[1], -1)).reshape(rows, *gate_up.shape[1:])
        if self.gate_up_bias is not None:
            h = h + self.gate_up_bias[...].astype(x.dtype)
        h = (activate(self.moe, h) * share[..., None]).reshape(rows, -1)
        y = h @ self.down[...].astype(x.dtype).reshape(h.shape[1], -1)
        return y if self.down_bias is None else y + share @ self.down_bias[...].astype(x.dtype)


class MoE(nnx.Module):
    """Routed experts, and the shared expert behind its gate where there is one."""

    def __init__(self, dim: int, moe: MoeConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.moe = moe
        self.router = linear(dim, moe.num_experts, bias=moe.bias, dtype=dtype, rngs=rngs)
        experts = DenseExperts if moe.dense else Experts
        self.experts = experts(dim, moe, dtype=dtype, rngs=rngs)
        shared = moe.shared_intermediate_size
        self.shared = MLP(dim, shared, dtype=dtype, rngs=rngs) if shared else None
        self.shared_gate = linear(dim, 1, dtype=dtype, rngs=rngs) if shared else None

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
