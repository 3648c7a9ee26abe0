"""The target: a decoder whose layers, norms, attention and MLPs are chosen by its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax.cache import TargetCache
from dflash_jax.config import TargetConfig
from dflash_jax.models.attention import Attention, Place
from dflash_jax.models.gated_delta import GatedDelta
from dflash_jax.models.head import Head
from dflash_jax.models.layers import MLP, RMSNorm, linear, lookup, rotation
from dflash_jax.models.moe import MoE
from dflash_jax.sharding import constrain
from pallas_kernels.documents import positions
from pallas_kernels.head_sampling import Projection


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward:
    """What one pass over W rows gives."""

    hidden: Float[Array, "B W D"]  # after the final norm
    taps: Float[Array, "B W CD"]  # residual stream after each tapped layer, side by side
    layers: tuple[Any, ...]  # KeyValues, DeferredRows or Recurrence: to commit, or committed by a prefill
    router_logits: tuple[Float[Array, "R E"], ...]


class Layer(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TargetConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        c, kind = config, config.layer_types[index]
        self.input_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, c.norm, dtype=dtype)
        self.post_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, c.norm, dtype=dtype)
        if kind == "linear_attention" and c.gated_delta is not None:
            self.mixer = GatedDelta(c, c.gated_delta, dtype=dtype, rngs=rngs)
        else:
            self.mixer = Attention(c, kind, dtype=dtype, rngs=rngs)
        if c.moe is not None and c.is_sparse(index):
            self.mlp = MoE(c.hidden_size, c.moe, dtype=dtype, rngs=rngs)
        else:
            self.mlp = MLP(c.hidden_size, c.intermediate_size, bias=c.mlp_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, cache: Any, place: Place, deferred: bool) -> tuple[Array, Any, Array | None]:
        with jax.named_scope("mixer"):
            mixed, rows = self.mixer(self.input_norm(x), cache, place, deferred)
        x = x + mixed
        with jax.named_scope("mlp"):
            h = self.post_norm(x)
            out, logits = self.mlp(h) if isinstance(self.mlp, MoE) else (self.mlp(h), None)
        return x + out, rows, logits


class Target(nnx.Module):
    """A causal language model that can run a block of rows without committing them.

    Rows are tokens at positions `cache.lengths[b] + i`. Tap id i is the residual stream after layer i.
    """

    def __init__(self, config: TargetConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        c = self.config = config
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(
            c.vocab_size, c.hidden_size, param_dtype=dtype, embedding_init=init, rngs=rngs,
            embedding_metadata={"axes": ("vocab", "embed")},
        )  # fmt: skip
        self.layers = nnx.List([Layer(c, i, dtype=dtype, rngs=rngs) for i in range(c.num_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, c.norm, dtype=dtype)
        tied = c.tie_word_embeddings
        self.lm_head = None if tied else linear(c.hidden_size, c.vocab_size, ("embed", "vocab"), dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B W"],
        cache: TargetCache,
        count: Int[Array, "B"],
        *,
        tap_ids: Sequence[int],
        deferred: bool,
        segments: Int[Array, "B W"] | None = None,
    ) -> Forward:
        """Run W rows, the first `count[b]` of them real."""
        at = cache.lengths[:, None] + jnp.arange(tokens.shape[1]) if segments is None else positions(segments)
        x = self.lookup(tokens)
        turn = rotation(at, self.config.rope, x.dtype)
        place = Place(cache.lengths, count, turn, segments, cache.page_table)
        taps, layers, routers = {}, [], []
        for i, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            with jax.named_scope(f"layer{i}"):
                x, rows, logits = layer(x, layer_cache, place, deferred)
            # Left to itself XLA may spread the width as the weights are, and then mix up devices: rows of 12 tokens on
            # data 2 x fsdp 2 x tensor 2 came out wrong (jaxlib 0.10).
            x = constrain(x, "batch", "...")
            layers.append(rows)
            if logits is not None:
                routers.append(logits)
            taps[i] = x
        tapped = jnp.concatenate([taps[i] for i in tap_ids], -1) if tap_ids else x[..., :0]
        return Forward(self.norm(x), tapped, tuple(layers), tuple(routers))

    def verify(self, tokens: Int[Array, "B W"], cache: TargetCache, *, tap_ids: Sequence[int] = ()) -> Forward:
        """Run the rows of a proposal; `cache.commit(forward.layers, count)` keeps the first `count[b]` of them."""
        everything = jnp.full(tokens.shape[0], tokens.shape[1])
        return self(tokens, cache, everything, tap_ids=tap_ids, deferred=True)

    def prefill(
        self, tokens: Int[Array, "B W"], count: Int[Array, "B"], cache: TargetCache, *, tap_ids: Sequence[int] = ()
    ) -> tuple[Forward, TargetCache]:
        """Run and commit the first `count[b]` of W known tokens a sequence."""
        out = self(tokens, cache, count, tap_ids=tap_ids, deferred=False)
        return out, replace(cache, lengths=cache.lengths + count, layers=out.layers)

    def sequence(
        self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None, *, tap_ids: Sequence[int] = ()
    ) -> Forward:
        """Run whole sequences from nothing, for training and for `Pair.logits`; the rows are not kept.

        Documents of one row, numbered by `segments`, do not see each other: each runs as if it were alone.
        """
        batch, length = tokens.shape
        cache = TargetCache.empty(self.config, batch, 0, 1, self.embed.embedding.dtype)
        everything = jnp.full(batch, length)
        return self(tokens, cache, everything, tap_ids=tap_ids, deferred=False, segments=segments)

    def lookup(self, tokens: Int[Array, "B W"]) -> Float[Array, "B W D"]:
        """The tokens' embeddings."""
        return constrain(lookup(self.embed.embedding[...], tokens), "batch", None, None)

    @property
    def head(self) -> Head:
        """The vocabulary product; call it for logits."""
        if self.lm_head is None:
            return Head(self.embed.embedding[...], Projection("vd"))
        return Head(self.lm_head.kernel[...], Projection("dv"))
