"""The block-diffusion drafter: DFlash (arXiv 2602.06036) and DFlash 2.

It has no embedding and no head: it borrows the target's, but for the mask token's embedding where a checkpoint brings
that. In every layer the queries come from the block's rows only; keys and values come from the context (the target's
taps, fused once for all layers) and from the block's rows.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax.cache import DrafterCache, KeyValues
from dflash_jax.config import DrafterConfig
from dflash_jax.models.attention import sharded_attention
from dflash_jax.models.head import Head
from dflash_jax.models.layers import MLP, RMSNorm, Rotation, linear, rotate, rotation, side_by_side
from dflash_jax.models.target import Target
from dflash_jax.sharding import constrain, shards
from pallas_kernels.head_sampling import Projection


class DynamicConv(nnx.Module):
    """Two-tap grouped convolution along the block, its taps moved by the sub-layer's input; at first the identity."""

    def __init__(self, config: DrafterConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        dim, self.group = config.hidden_size, config.conv_group_size
        self.base = nnx.Param(jnp.zeros((2, 2, dim), dtype).at[:, 0].set(1))  # [before/after, tap, D]
        self.proj = linear(dim, 4 * dim // self.group, ("embed", None), dtype=dtype, rngs=rngs)
        self.proj.kernel[...] = jnp.zeros_like(self.proj.kernel[...])

    def __call__(self, x: Float[Array, "... W D"]) -> tuple[Array, Callable[[Array], Array]]:
        """x convolved for the sub-layer, and the convolution to put behind the sub-layer."""
        shift = self.proj(x).reshape(*x.shape[:-1], 2, 2, -1)
        taps = self.base[...].astype(x.dtype) + jnp.repeat(shift, self.group, axis=-1)  # [... W 2 2 D]

        def convolve(y: Array, side: int) -> Array:
            before = jnp.pad(y[..., :-1, :], [(0, 0)] * (y.ndim - 2) + [(1, 0), (0, 0)])
            return taps[..., side, 0, :] * y + taps[..., side, 1, :] * before

        return convolve(x, 0), lambda y: convolve(y, 1)


def _unchanged(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    return x, lambda y: y


class DrafterAttention(nnx.Module):
    """Queries, output and norms of one layer; keys and values of all layers are made by `Drafter.kv_proj`."""

    def __init__(self, config: DrafterConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        c, width = config, config.num_heads * config.head_dim
        heads = ("heads", c.num_heads)
        self.q_proj = linear(c.hidden_size, width, ("embed", heads), bias=c.attention_bias, dtype=dtype, rngs=rngs)
        self.o_proj = linear(width, c.hidden_size, (heads, "embed"), bias=c.attention_bias, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype=dtype)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype=dtype)


class DrafterLayer(nnx.Module):
    """One layer of the drafter, with DFlash 2's convolutions around both sub-layers where configured."""

    def __init__(self, config: DrafterConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = config
        self.input_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.post_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.attention = DrafterAttention(c, dtype=dtype, rngs=rngs)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, dtype=dtype, rngs=rngs)
        self.attention_conv = DynamicConv(c, dtype=dtype, rngs=rngs) if c.conv_kernel_size else None
        self.mlp_conv = DynamicConv(c, dtype=dtype, rngs=rngs) if c.conv_kernel_size else None

    def __call__(self, x: Float[Array, "... W D"], attend: Callable[[Array], Array]) -> Float[Array, "... W D"]:
        """`attend` maps normed rows [..., W, D] to heads side by side [..., W, N * H]."""
        h, after = (self.attention_conv or _unchanged)(self.input_norm(x))
        x = x + after(self.attention.o_proj(attend(h)))
        h, after = (self.mlp_conv or _unchanged)(self.post_norm(x))
        return x + after(self.mlp(h))


class Selector(nnx.Module):
    """DFlash 2's candidate selector: how well token b follows token a at a row, of rank R."""

    def __init__(self, config: DrafterConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.selector_rank)
        # Their width is spread, not their tokens: a row is then looked up where it is needed.
        axes = (None, "rank")
        self.predecessor = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, dtype), axes=axes)
        self.successor = nnx.Param(jnp.zeros(shape, dtype), axes=axes)
        self.hidden = linear(config.hidden_size, config.selector_rank, ("embed", None), dtype=dtype, rngs=rngs)

    def __call__(
        self, previous: Int[Array, "... P"], candidates: Int[Array, "... C"], hidden: Float[Array, "... D"]
    ) -> Float[Array, "... P C"]:
        """What to add to the candidates' logits behind each of P tokens that may come before them, in fp32."""
        query = self.predecessor[...][previous].astype(hidden.dtype) * self.hidden(hidden)[..., None, :]
        keys = self.successor[...][candidates].astype(hidden.dtype)
        return jnp.einsum("...pr,...cr->...pc", query, keys, preferred_element_type=jnp.float32)


class Drafter(nnx.Module):
    """Block rows stand at positions `lengths[b] + i`: the anchor, then a mask token for each drafted row."""

    def __init__(self, config: DrafterConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        c = self.config = config
        self.fc = linear(len(c.tap_ids) * c.hidden_size, c.hidden_size, ("taps", "embed"), dtype=dtype, rngs=rngs)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.kv_proj = StackedKeyValues(c, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([DrafterLayer(c, dtype=dtype, rngs=rngs) for _ in range(c.num_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.selector = Selector(c, dtype=dtype, rngs=rngs) if c.selector_rank else None
        mask = nnx.initializers.normal(0.02)(rngs.params(), (c.hidden_size,), dtype) if c.mask_embedding else None
        self.mask_embedding = None if mask is None else nnx.Param(mask, axes=("embed",))

    def embed(self, target: Target, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return the target's embeddings of block rows, in which the mask token may have one of the drafter's own."""
        rows = target.lookup(tokens)
        if self.mask_embedding is None:
            return rows
        masked = tokens == self.config.mask_token_id
        return jnp.where(masked[..., None], self.mask_embedding[...].astype(rows.dtype), rows)

    def context(
        self, taps: Float[Array, "B T CD"], lengths: Int[Array, "B"], positions: Int[Array, "B T"] | None = None
    ) -> tuple[tuple[Array, Array], ...]:
        """Keys and values [B, T, K, H] of T context rows for every layer, from one stacked product.

        They stand at `lengths[b]` and after, or at the given positions.
        """
        c = self.config
        B, T, _ = taps.shape
        positions = lengths[:, None] + jnp.arange(T) if positions is None else positions
        features = constrain(self.hidden_norm(self.fc(taps.astype(self.fc.kernel.dtype))), "batch", "...")
        turn = rotation(positions, c.rope, features.dtype)
        keys_values = self.kv_proj(features).reshape(c.num_layers, B, T, 2, c.num_kv_heads, c.head_dim)

        return tuple(
            (rotate(layer.attention.k_norm(kv[:, :, 0]), turn), kv[:, :, 1])
            for layer, kv in zip(self.layers, keys_values, strict=True)
        )

    def __call__(
        self,
        x: Float[Array, "B W D"],
        cache: DrafterCache,
        lengths: Int[Array, "B"],
        page_table: Int[Array, "B n"] | None = None,
    ) -> Float[Array, "B W D"]:
        """Hidden states of the block after the final norm; x are its embeddings. Nothing of the block is kept."""
        c = self.config
        x = x.astype(self.fc.kernel.dtype) * c.input_embedding_scale
        turn = rotation(lengths[:, None] + jnp.arange(x.shape[1]), c.rope, x.dtype)
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"draft{i}"):
                x = layer(x, lambda h, i=i: self._attend(i, h, cache.layers[i], lengths, page_table, turn))
            x = constrain(x, "batch", "...")
        return self.norm(x)

    def _attend(
        self, i: int, h: Array, cache: KeyValues, lengths: Array, page_table: Array | None, turn: Rotation
    ) -> Array:
        c = self.config
        q, k, v = self.heads(i, h)
        out, *_ = sharded_attention(
            rotate(q, turn), cache, rotate(k, turn), v, lengths, page_table,
            causal=c.causal[i], scale=c.head_dim**-0.5, window=self.window(i), write=False,
        )  # fmt: skip
        return side_by_side(out)

    def window(self, i: int) -> int | None:
        return self.config.sliding_window if self.config.layer_types[i] == "sliding_attention" else None

    def heads(self, i: int, h: Float[Array, "... W D"]) -> tuple[Array, Array, Array]:
        """Queries [..., W, N, H], keys and values [..., W, K, H] of block rows in layer i, normed, not yet turned."""
        c, attention = self.config, self.layers[i].attention
        q = attention.q_norm(attention.q_proj(h).reshape(*h.shape[:-1], c.num_heads, c.head_dim))
        kv = self.kv_proj.of_layer(i, h).reshape(*h.shape[:-1], 2, c.num_kv_heads, c.head_dim)
        return q, attention.k_norm(kv[..., 0, :, :]), kv[..., 1, :, :]

    def head(self, target: Head) -> Head:
        """The target's head for the drafter's hidden states, scaled and capped as configured."""
        c = self.config
        return replace(
            target, projection=Projection(target.projection.layout, c.output_multiplier, c.final_logit_softcapping)
        )


class StackedKeyValues(nnx.Module):
    """Key and value projections of all L layers in one kernel [L, D, 2, K * H]."""

    def __init__(self, config: DrafterConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        c, init = config, nnx.initializers.normal(0.02)
        layers, width, heads = c.num_layers, c.num_kv_heads * c.head_dim, ("kv_heads", c.num_kv_heads)
        kernel = init(rngs.params(), (layers, c.hidden_size, 2, width), dtype)
        self.kernel = nnx.Param(kernel, axes=(None, "embed", None, heads))
        bias = jnp.zeros((layers, 2, width), dtype) if c.attention_bias else None
        self.bias = None if bias is None else nnx.Param(bias, axes=(None, None, heads))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "L B T 2 KH"]:
        kernel = self.kernel[...].astype(x.dtype)
        layers, dim = kernel.shape[:2]
        if shards("kv_heads") > 1:  # joining keys and values would join what is on several devices
            out = jnp.einsum("btd,ldcw->lbtcw", x, kernel)
            return out if self.bias is None else out + self.bias[...].astype(x.dtype)[:, None, None]
        # One batched product. Without the barrier XLA turns the kernels round in every call to make a plain one of it.
        rows = jax.lax.optimization_barrier(
            jnp.broadcast_to(x.reshape(-1, dim), (layers, x.shape[0] * x.shape[1], dim))
        )
        out = jnp.matmul(rows, kernel.reshape(layers, dim, -1)).reshape(layers, *x.shape[:-1], *kernel.shape[2:])
        return out if self.bias is None else out + self.bias[...].astype(x.dtype)[:, None, None]

    def of_layer(self, i: int, x: Float[Array, "... D"]) -> Float[Array, "... 2 KH"]:
        # With the barrier XLA takes the layer's kernel out once a dispatch; without, it is copied in every round.
        kernel = jax.lax.optimization_barrier(self.kernel[i])
        out = jnp.einsum("...d,dcw->...cw", x, kernel.astype(x.dtype))
        return out if self.bias is None else out + self.bias[i].astype(x.dtype)
