"""The training attention of published drafters at real sizes, forward and backward, for the ahead-of-time table."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.anchored_attention import anchored_attention
from pallas_kernels.anchored_attention.plan import make_plan
from pallas_kernels.case import Case
from pallas_kernels.dispatch import Implementation

ANCHORS = 512  # blocks a sequence, as the drafters were trained with

# Drafter: query heads, KV heads, head size, block, and the context lengths of its (causal, window) layers. The drafters
# of the two Qwen3.5 models have the same heads.
LENGTHS = 4096, 32768
FULL = (False, None, LENGTHS)
DRAFTERS = {
    "Qwen3.5-397B-A17B and Qwen3.5-35B-A3B": (32, 8, 128, 16, (FULL, (True, 4096, LENGTHS[1:]))),
    "Qwen3-Coder-30B-A3B": (32, 4, 128, 16, (FULL,)),
    "gpt-oss-120b": (64, 8, 64, 10, (FULL,)),
}


def cases(batch: int = 8) -> Iterator[Case]:
    """Each kind of layer of each drafter, the forward alone and with its backward."""
    for model, (heads, kv_heads, head, rows, layers) in DRAFTERS.items():
        for causal, window, contexts in layers:
            for context in contexts:
                kind = "full" if window is None else f"window {window}"
                name = f"drafter of {model}, {kind}, batch {batch}, context {context}, {ANCHORS} x W {rows}"
                yield from _both(name, (batch, ANCHORS, rows, heads, head), kv_heads, context, causal, window)


def _both(
    name: str, shape: tuple[int, int, int, int, int], kv_heads: int, context: int, causal: bool, window: int | None
) -> Iterator[Case]:
    B, A, W, N, H = shape
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    ctx = jax.ShapeDtypeStruct((B, context, kv_heads, H), jnp.bfloat16)
    blk = jax.ShapeDtypeStruct((B, A, W, kv_heads, H), jnp.bfloat16)
    anchors = jax.ShapeDtypeStruct((B, A), jnp.int32)
    arrays = (q, ctx, ctx, blk, blk, anchors)
    options = {"causal": causal, "window": window, "scale": H**-0.5}
    evenly = (np.broadcast_to(np.linspace(1, context - 1, A).astype(np.int32), (B, A)),)
    plan = make_plan(shape, kv_heads, context, q.dtype.itemsize)
    rows, lse = q.size * 2, B * A * W * N * 4
    own, shared, places = 2 * blk.size * 2, 2 * ctx.size * 2, anchors.size * 4
    # What is seen on average by anchors spread evenly: the context before them, cut by the window, and the block.
    reach = context if window is None else min(window, context)
    seen = W + reach * (1 - reach / (2 * context))
    product = 2 * B * A * W * N * H * seen
    yield Case(
        f"forward: {name}", functools.partial(anchored_attention, **options), arrays,
        must_move=2 * rows + own + shared + places, moved=plan.forward_bytes(), flops=int(2 * product),
        whole=evenly,
    )  # fmt: skip
    forward_and_backward = functools.partial(_vjp, **options)
    both = plan.forward_bytes() + plan.backward_bytes()
    # Backward reads what the forward saved (output, log-sum-exps) and the output's gradient, and writes five gradients.
    yield Case(
        f"forward and backward: {name}", forward_and_backward, (q, *arrays),
        must_move=2 * rows + own + shared + places + 4 * rows + lse + 2 * own + 2 * shared + places,
        moved=both, flops=int(7 * product), whole=evenly,
    )  # fmt: skip


def _vjp(do: jax.Array, *arrays: jax.Array, implementation: Implementation | None, **options: Any) -> tuple:
    """Output and the five gradients."""
    call = functools.partial(anchored_attention, anchors=arrays[-1], implementation=implementation, **options)
    out, pull = jax.vjp(call, *arrays[:-1])
    return out, *pull(do)
