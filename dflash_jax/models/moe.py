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


class Experts(nnx.Module):
    """E expert MLPs in stacked arrays [E, in, out]."""

    def __init__(self, dim: int, moe: MoeConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.moe = moe
        init, E, F = nnx.initializers.normal(0.02), moe.num_experts, moe.intermediate_size
        self.gate_up = nnx.Param(init(rngs.params(), (E, dim, 2, F), dtype))
        self.down = nnx.Param(init(rngs.params(), (E, F, dim), dtype))
        self.gate_up_bias = nnx.Param(jnp.zeros((E, 2, F), dtype)) if moe.bias else None
        self.down_bias = nnx.Param(jnp.zeros((E, dim), dtype)) if moe.bias else None

    def __call__(
        self, x: Float[Array, "R D"], chosen: Int[Array, "R k"], weights: Float[Array, "R k"]
    ) -> Float[Array, "R D"]:
        """Sum over each row's chosen experts, weighted.

        Few experts: all of them as plain products, which costs less than picking. Few rows: only the chosen ones are
        read. Else rows are grouped by expert.
        """
        rows, k = chosen.shape
        if self.moe.num_experts <= 4 * k:
            return self._dense(x, chosen, weights)
        if rows * k <= self.moe.num_experts:
            return self._gathered(x, chosen, weights)
        return self._grouped(x, chosen, weights)

    def _activate(self, h: Float[Array, "... 2 F"]) -> Float[Array, "... F"]:
        gate, up = h[..., 0, :], h[..., 1, :]
        return swiglu(gate, up) if self.moe.swiglu_limit is None else clamped_swiglu(gate, up, self.moe.swiglu_limit)

    def _in(self, x: Float[Array, "... R D"], kernel: Float[Array, "... D 2 F"]) -> Float[Array, "... R 2 F"]:
        """x times each kernel of the batch; as a batched product no kernel is laid out anew."""
        h = jnp.matmul(x, kernel.astype(x.dtype).reshape(*kernel.shape[:-2], -1))
        return h.reshape(*h.shape[:-1], *kernel.shape[-2:])

    def _gathered(self, x: Array, chosen: Array, weights: Array) -> Array:
        """Each row's own expert matrices, gathered."""
        h = self._in(x[:, None, None], self.gate_up[...][chosen])[:, :, 0]
        if self.gate_up_bias is not None:
            h = h + self.gate_up_bias[...][chosen]
        y = jnp.matmul(self._activate(h)[:, :, None], self.down[...][chosen].astype(x.dtype))[:, :, 0]
        if self.down_bias is not None:
            y = y + self.down_bias[...][chosen]
        return jnp.sum(y * weights[..., None].astype(x.dtype), 1)

    def _dense(self, x: Array, chosen: Array, weights: Array) -> Array:
        """All experts for all rows."""
        one_hot = jax.nn.one_hot(chosen, self.moe.num_experts, dtype=x.dtype)
        share = jnp.sum(one_hot * weights[..., None].astype(x.dtype), 1)  # [R E]
        every = jnp.broadcast_to(x, (self.moe.num_experts, *x.shape))
        # Without the barrier XLA makes one product of it, and lays all the kernels anew for it in every round.
        h = self._in(jax.lax.optimization_barrier(every), self.gate_up[...])  # [E R 2 F]
        if self.gate_up_bias is not None:
            h = h + self.gate_up_bias[...][:, None]
        h = self._activate(h) * share.T[..., None]
        h = h.swapaxes(0, 1).reshape(len(x), -1)
        y = h @ self.down[...].astype(x.dtype).reshape(h.shape[1], -1)
        return y if self.down_bias is None else y + share @ self.down_bias[...].astype(x.dtype)

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
        y = jax.lax.ragged_dot(self._activate(h), down, sizes)
        if self.down_bias is not None:
            y = y + self.down_bias[...][expert]
        y = y * weights.reshape(-1)[order][:, None].astype(x.dtype)
        return jnp.zeros((rows, x.shape[1]), x.dtype).at[order // k].add(y)


class MoE(nnx.Module):
    """Routed experts, and the shared expert behind its gate where there is one."""

    def __init__(self, dim: int, moe: MoeConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.moe = moe
        self.router = linear(dim, moe.num_experts, bias=moe.bias, dtype=dtype, rngs=rngs)
        self.experts = Experts(dim, moe, dtype=dtype, rngs=rngs)
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
