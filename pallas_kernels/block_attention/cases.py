"""Real sizes: the attention layers of four targets and two drafters."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention.attention import block_attention
from pallas_kernels.block_attention.plan import make_plan
from pallas_kernels.case import Case

PAGE = 256
CHIP = 12 * 2**30  # bytes of one layer's cache that a case may hold on a chip: the least of the chips has 16 GiB


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    sinks: bool = False
    drafter: bool = False  # bidirectional, nothing written

    @property
    def packed(self) -> int:
        """Heads side by side in the cache."""
        return max(128 // self.head_dim, 1)


LAYERS = (
    Layer("Qwen3.5-397B-A17B", 32, 2, 256),
    Layer("Qwen3.5-35B-A3B", 16, 2, 256),
    Layer("Qwen3-Coder-30B-A3B", 32, 4, 128),
    Layer("gpt-oss-120b full", 64, 8, 64, sinks=True),
    Layer("gpt-oss-120b sliding", 64, 8, 64, window=128, sinks=True),
    Layer("Qwen3.5-397B-A17B-DFlash full", 32, 8, 128, drafter=True),
    Layer("Qwen3-Coder-30B-A3B-DFlash", 32, 4, 128, drafter=True),
)


def cases() -> Iterator[Case]:
    """Batch 1 and 32, context 1K, 32K and 256K (the block's rows included), 1, 16 and 64 rows; drafters 16 rows."""
    for layer in LAYERS:
        for batch in (1, 32):
            for context in (2**10, 2**15, 2**18):
                for width in (16,) if layer.drafter else (1, 16, 64):
                    yield case(layer, batch, context, width)


def case(layer: Layer, batch: int, context: int, width: int) -> Case:
    """A layer, or as many of its heads as leave its cache on one chip."""
    shard = 1
    while 4 * batch * context * layer.kv_heads * layer.head_dim // shard > CHIP:
        shard *= 2
    N, K, H = layer.heads // shard, layer.kv_heads // shard, layer.head_dim
    packed = min(layer.packed, K)
    bf16 = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, rows = bf16((batch, width, N, H)), bf16((batch, width, K, H))
    cache = bf16((batch * context // PAGE, K // packed, PAGE, packed * H))
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    table = jax.ShapeDtypeStruct((batch, context // PAGE), jnp.int32)
    sinks = jax.ShapeDtypeStruct((N,), jnp.float32) if layer.sinks else None

    options = {"causal": not layer.drafter, "scale": H**-0.5, "window": layer.window, "write": not layer.drafter}

    def call(q, keys, values, block_keys, block_values, lengths, page_table, sinks, *, implementation):
        return block_attention(
            q, keys, values, block_keys, block_values, lengths,
            page_table=page_table, sinks=sinks, implementation=implementation, **options,
        )  # fmt: skip

    plan = make_plan(q, cache, table, masks=0, sinks=layer.sinks, soft_cap=None, **options)
    seen = context - width if layer.window is None else layer.window - 1
    row = 2 * 2 * K * H
    heads = f" heads/{shard}" if shard > 1 else ""
    return Case(
        name=f"{layer.name}{heads}, batch {batch}, context {context // 1024}K, W {width}",
        function=call,
        arguments=(q, cache, cache, rows, rows, lengths, table, sinks),
        # The context once, the block's rows (and once more where they are written), queries and output.
        must_move=batch * (seen * row + width * row * (1 if layer.drafter else 2) + 2 * 2 * width * N * H),
        moved=plan.bytes_moved(plan.full),
        flops=4 * batch * width * N * H * (seen + width),
        whole=(np.full(batch, context - width), np.random.default_rng(0).permutation(table.size).reshape(table.shape)),
    )
