"""Gated DeltaNet, the recurrent layer of Qwen3-Next and Qwen3.5 (arXiv 2412.06464)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dflash_jax.cache import DeferredRows, Recurrence
from dflash_jax.config import GatedDeltaConfig, TargetConfig
from dflash_jax.models.attention import Place
from dflash_jax.models.layers import RMSNorm, linear, side_by_side
from dflash_jax.sharding import per_shard
from pallas_kernels.gated_delta import gated_delta_block, gated_delta_prefill

_STATE, _ROWS = ("batch", "key_heads"), ("batch", None, "key_heads")  # axes of states and of rows, heads by key head
_INPUTS = (_STATE, _STATE, _ROWS, _ROWS, _ROWS, _ROWS, (None, "key_heads"), ("key_heads",), ("key_heads",))


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
        b, a = (y.reshape(B, W, c.num_v_heads) for y in (b, a))
        given = cache.state, cache.pending, cache.conv, mix, b, a, self.conv[...], self.A_log[...], self.dt_bias[...]
        if deferred:
            out, state, left = per_shard(gated_delta_block, _INPUTS, (_ROWS, _STATE, _STATE))(*given)
            rows = DeferredRows(state=state, rows=left, tail=cache.conv, mixed=mix)
        else:
            run = per_shard(gated_delta_prefill, (*_INPUTS, ("batch",), ("batch", None)), (_ROWS, _STATE))
            out, state = run(*given, place.count, place.segments)
            rows = cache.after(state, mix, place.count)
        gated = self.norm(out).astype(jnp.float32) * jax.nn.silu(z.reshape(out.shape).astype(jnp.float32))
        return self.out_proj(side_by_side(gated.astype(x.dtype))), rows
