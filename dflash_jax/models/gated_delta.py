"""Gated DeltaNet, the recurrent layer of Qwen3-Next and Qwen3.5 (arXiv 2412.06464)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dflash_jax.cache import DeferredRows, Recurrence
from dflash_jax.config import GatedDeltaConfig, TargetConfig
from dflash_jax.models.attention import Place
from dflash_jax.models.layers import RMSNorm, linear
from pallas_kernels.gated_delta import fold, gated_delta_block, gated_delta_prefill


def _unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


class GatedDelta(nnx.Module):
    """Columns of `in_proj` and channels of `conv` stand key head by key head, so that heads shard as one axis."""

    def __init__(self, config: TargetConfig, gated_delta: GatedDeltaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = self.config = gated_delta
        self.ratio = c.num_v_heads // c.num_k_heads
        self.channels = 2 * c.k_head_dim + self.ratio * c.v_head_dim
        columns = c.num_k_heads * (self.channels + self.ratio * c.v_head_dim + 2 * self.ratio)
        heads = ("key_heads", c.num_k_heads)
        self.in_proj = linear(config.hidden_size, columns, ("embed", heads), dtype=dtype, rngs=rngs)
        init = nnx.initializers.normal(c.conv_kernel**-0.5)
        taps = init(rngs.params(), (c.conv_kernel, c.num_k_heads, self.channels), dtype)
        self.conv = nnx.Param(taps, axes=(None, heads, None))
        rates = jax.random.uniform(rngs.params(), (c.num_v_heads,), minval=1e-3, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(rates), axes=(heads,))
        self.dt_bias = nnx.Param(jnp.ones(c.num_v_heads), axes=(heads,))
        self.norm = RMSNorm(c.v_head_dim, config.rms_norm_eps, dtype=dtype)
        width = c.num_v_heads * c.v_head_dim
        self.out_proj = linear(width, config.hidden_size, (heads, "embed"), dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B W D"], cache: Recurrence, place: Place, deferred: bool
    ) -> tuple[Float[Array, "B W D"], DeferredRows | Recurrence]:
        """The rows' output, and what any prefix of them can be committed from (deferred) or the state after them."""
        c, r = self.config, self.ratio
        B, W, _ = x.shape
        grouped = self.in_proj(x).reshape(B, W, c.num_k_heads, -1)
        edges = [self.channels, self.channels + r * c.v_head_dim, self.channels + r * c.v_head_dim + r]
        mix, z, b, a = jnp.split(grouped, edges, -1)
        history = jnp.concatenate([cache.conv, mix], 1)
        q, k, v = self._convolved(history, W)

        def heads_first(y: Array) -> Array:
            return y.reshape(B, W, c.num_v_heads).swapaxes(1, 2)

        beta = jax.nn.sigmoid(heads_first(b)).astype(jnp.float32)
        dt = heads_first(a).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)[:, None]
        g = -jnp.exp(self.A_log[...].astype(jnp.float32))[:, None] * jax.nn.softplus(dt)
        state = fold(cache.state, cache.pending)
        if deferred:
            out, left = gated_delta_block(state, q, k, v, beta, g)
            rows = DeferredRows(state=state, rows=left, history=history)
        else:
            real = (jnp.arange(W) < place.count[:, None])[:, None]
            out, state = gated_delta_prefill(state, q, k, v, jnp.where(real, beta, 0.0), jnp.where(real, g, 0.0))
            rows = cache.after(state, history, place.count)
        out = out.swapaxes(1, 2).astype(x.dtype)  # [B W Hv Dv]
        gated = self.norm(out).astype(jnp.float32) * jax.nn.silu(z.reshape(out.shape).astype(jnp.float32))
        return self.out_proj(gated.astype(x.dtype).reshape(B, W, -1)), rows

    def _convolved(self, history: Float[Array, "B T Hk C"], W: int) -> tuple[Array, Array, Array]:
        """q, k [B Hk W Dk] of unit length (q scaled) and v [B Hv W Dv], in fp32, after the causal convolution."""
        c = self.config
        taps = self.conv[...].astype(history.dtype)
        mixed = jax.nn.silu(sum(history[:, i : i + W] * taps[i] for i in range(c.conv_kernel)))
        q, k, v = jnp.split(mixed.astype(jnp.float32), [c.k_head_dim, 2 * c.k_head_dim], -1)
        v = v.reshape(*v.shape[:2], c.num_v_heads, c.v_head_dim)
        q, k, v = (y.swapaxes(1, 2) for y in (_unit(q) * c.k_head_dim**-0.5, _unit(k), v))
        return q, k, v
