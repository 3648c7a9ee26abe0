"""Grouped-query attention of the targets: biases, q/k norms, output gate, sinks and windows by configuration."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax.cache import KeyValues
from dflash_jax.config import TargetConfig
from dflash_jax.models.layers import RMSNorm, Rotation, linear, rotate, side_by_side
from dflash_jax.sharding import per_shard, shards, with_copies
from pallas_kernels.block_attention import block_attention
from pallas_kernels.document_attention import document_attention


def sharded_attention(
    q: Float[Array, "B W N H"],
    cache: KeyValues,
    k: Float[Array, "B W K H"],
    v: Float[Array, "B W K H"],
    lengths: Int[Array, "B"],
    page_table: Int[Array, "B n"] | None = None,
    *,
    sinks: Float[Array, "N"] | None = None,
    **options: Any,
) -> tuple[Array, Array, Array]:
    """`block_attention` on every device's own sequences and heads; arguments and results as there.

    Where there are fewer KV heads than the axis is long, each is copied, so that a shard has just the one it needs.
    Pages belong to no sequence: ValueError for a page table on a mesh that spreads the batch.
    """
    k, v = with_copies(k), with_copies(v)
    if page_table is not None and shards("batch") > 1:
        raise ValueError("a paged cache takes a mesh whose axes data and fsdp have size 1")

    def attend(
        q: Array, keys: Array, values: Array, k: Array, v: Array, lengths: Array, table: Array | None, sinks: Any
    ) -> Any:
        return block_attention(q, keys, values, k, v, lengths, page_table=table, sinks=sinks, **options)

    queries, rows = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    cached = ("batch" if page_table is None else None, "kv_heads", None, None)
    inputs = [queries, cached, cached, rows, rows, ("batch",), ("batch", None), ("heads",)]
    arrays = q, cache.keys, cache.values, k, v, lengths, page_table, sinks
    return per_shard(attend, inputs, (queries, cached, cached))(*arrays)


def packed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    sinks: Float[Array, "N"] | None = None,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """`document_attention` on every device's own sequences and heads."""
    rows, kv_rows = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    run = per_shard(partial(document_attention, **options), [rows, kv_rows, kv_rows, ("batch", None), ("heads",)], rows)
    return run(q, with_copies(k), with_copies(v), segments, sinks)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """Where the rows of one forward stand, the same for all layers."""

    lengths: Int[Array, "B"]  # committed rows before them
    count: Int[Array, "B"]  # how many of the rows are real
    rotation: Rotation
    segments: Int[Array, "B W"] | None = None  # the documents in a row; None: one
    page_table: Int[Array, "B n"] | None = None


class Attention(nnx.Module):
    """One attention layer of a target."""

    def __init__(self, config: TargetConfig, kind: str, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = self.config = config
        self.window = c.sliding_window if kind == "sliding_attention" else None
        per_head = c.head_dim * (2 if c.gated_attention else 1)
        heads, into_kv = ("heads", c.num_heads), ("embed", ("kv_heads", c.num_kv_heads))
        made: Any = {"dtype": dtype, "rngs": rngs}
        self.q_proj = linear(c.hidden_size, c.num_heads * per_head, ("embed", heads), bias=c.qkv_bias, **made)
        self.k_proj = linear(c.hidden_size, c.num_kv_heads * c.head_dim, into_kv, bias=c.qkv_bias, **made)
        self.v_proj = linear(c.hidden_size, c.num_kv_heads * c.head_dim, into_kv, bias=c.qkv_bias, **made)
        self.o_proj = linear(c.num_heads * c.head_dim, c.hidden_size, (heads, "embed"), bias=c.o_bias, **made)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, c.norm, dtype=dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, c.norm, dtype=dtype) if c.qk_norm else None
        self.sinks = nnx.Param(jnp.zeros(c.num_heads, dtype), axes=(heads,)) if c.sinks else None

    def __call__(
        self, x: Float[Array, "B W D"], cache: KeyValues, place: Place, deferred: bool
    ) -> tuple[Float[Array, "B W D"], KeyValues]:
        """The rows' output, and the cache with their keys and values behind the committed ones."""
        c = self.config
        B, W, _ = x.shape
        q, gate = self.q_proj(x).reshape(B, W, c.num_heads, -1), None
        if c.gated_attention:
            q, gate = jnp.split(q, 2, -1)
        k = self.k_proj(x).reshape(B, W, c.num_kv_heads, c.head_dim)
        v = self.v_proj(x).reshape(B, W, c.num_kv_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, place.rotation), rotate(k, place.rotation)
        options: Any = {
            "scale": c.head_dim**-0.5,
            "window": self.window,
            "sinks": None if self.sinks is None else self.sinks[...],
        }
        if place.segments is None:
            out, *rows = sharded_attention(q, cache, k, v, place.lengths, place.page_table, causal=True, **options)
            cache = KeyValues(*rows)
        else:
            out = packed_attention(q, k, v, place.segments, **options)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        return self.o_proj(side_by_side(out)), cache
