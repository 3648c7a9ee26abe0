"""Gated DeltaNet, the recurrent layer of Qwen3-Next and Qwen3.5 (arXiv 2412.06464)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dflash_jax.cache import DeferredRows, Recurrence
from dflash_jax.config import GatedDeltaConfig, TargetConfig
from dflash_jax.models.attention import Place
from dflash_jax.models.layers import RMSNorm, linear
from pallas_kernels.gated_delta import gated_delta_block, gated_delta_prefill


class GatedDelta(nnx.Module):
    """Columns of `in_proj` and channels of `conv` stand key head by key head, so that heads shard as one axis."""

    def __init__(self, config: TargetConfig, gated_delta: GatedDeltaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = self.config = gated_delta
        self.ratio = c.num_v_heads // c.num_k_heads
        self.channels = 2 * c.k_head_dim + self.ratio * c.v_head_dim
        columns = c.num_k_heads * (self.channels + self.ratio * c.v_head_dim + 2 * self.ratio)
        self.in_proj = linear(config.hidden_size, columns, dtype=dtype, rngs=rngs)
        init = nnx.initializers.normal(c.conv_kernel**-0.5)
        self.conv = nnx.Param(init(rngs.params(), (c.conv_kernel, c.num_k_heads, self.channels), dtype))
        rates = jax.random.uniform(rngs.params(), (c.num_v_heads,), minval=1e-3, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(rates))
        self.dt_bias = nnx.Param(jnp.ones(c.num_v_heads))
        self.norm = RMSNorm(c.v_head_dim, config.rms_norm_eps, dtype=dtype)
        self.out_proj = linear(c.num_v_heads * c.v_head_dim, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B W D"], cache: Recurrence, place: Place, deferred: bool
    ) -> tuple[Float[Array, "B W D"], DeferredRows | Recurrence]:
        """The rows' output, and what any prefix of them can be committed from (deferred) or the state after them."""
        c, r = self.config, self.ratio
        B, W, _ = x.shape
        grouped = self.in_proj(x).reshape(B, W, c.num_k_heads, -1)
        edges = [self.channels, self.channels + r * c.v_head_dim, self.channels + r * c.v_head_dim + r]
        mix, z, b, a = jnp.split(grouped, edges, -1)
        b, a = (y.reshape(B, W, c.num_v_heads) for y in (b, a))
        gates = b, a, self.conv[...], self.A_log[...], self.dt_bias[...]
        if deferred:
            out, state, left = gated_delta_block(cache.state, cache.pending, cache.conv, mix, *gates)
            rows = DeferredRows(state=state, rows=left, tail=cache.conv, mixed=mix)
        else:
            out, state = gated_delta_prefill(cache.state, cache.pending, cache.conv, mix, *gates, place.count)
            rows = cache.after(state, mix, place.count)
        gated = self.norm(out).astype(jnp.float32) * jax.nn.silu(z.reshape(out.shape).astype(jnp.float32))
        return self.out_proj(gated.astype(x.dtype).reshape(B, W, -1)), rows
