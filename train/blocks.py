"""The drafter's training forward: many blocks of one sequence in a single pass over its shared context."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dflash_jax.models.drafter import Drafter, DrafterLayer
from dflash_jax.models.layers import rotate, rotation
from dflash_jax.sharding import constrain, per_shard, with_copies
from pallas_kernels.anchored_attention import anchored_attention

_QUERIES, _ROWS = ("batch", None, None, "heads", None), ("batch", None, None, "kv_heads", None)
_CONTEXT, _PLACES = ("batch", None, "kv_heads", None), ("batch", None)


def block_hidden(
    drafter: Drafter,
    embedded: Float[Array, "B A W D"],
    taps: Float[Array, "B T CD"],
    anchors: Int[Array, "B A"],
    starts: Int[Array, "B A"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    *,
    remat: bool = False,
) -> Float[Array, "B A W D"]:
    """Hidden states of all blocks after the final norm.

    Row w of block a stands w rows behind `anchors[b, a]`, and sees context strictly before it, from `starts[b, a]` on,
    where its document begins. `positions` are those of the context's rows in their documents. Keys and values of the
    context are made once and shared by all blocks of a sequence. With `remat` only the layers' inputs are kept for the
    backward pass, which makes the rest again.
    """
    c = drafter.config
    B, A, W, _ = embedded.shape
    starts = jnp.zeros_like(anchors) if starts is None else starts
    context = drafter.context(taps, jnp.zeros(B, jnp.int32), positions)
    turn = rotation(((anchors - starts)[..., None] + jnp.arange(W)).reshape(B, A * W), c.rope, embedded.dtype)

    def turned(x: Array) -> Array:
        return rotate(x.reshape(B, A * W, *x.shape[3:]), turn).reshape(x.shape)

    def copied(x: Array) -> Array:  # where a shard of the query heads needs a KV head of its own
        return with_copies(x.reshape(B, A * W, *x.shape[3:])).reshape(B, A, W, -1, x.shape[-1])

    def attend(i: int, h: Float[Array, "B A W D"]) -> Float[Array, "B A W NH"]:
        q, k, v = drafter.heads(i, h)
        ctx_k, ctx_v = (with_copies(x) for x in context[i])
        options = {"causal": c.causal[i], "window": drafter.window(i), "scale": c.head_dim**-0.5}

        def on_shard(*given: Array) -> Array:
            q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts = given
            return anchored_attention(q, ctx_k, ctx_v, blk_k, blk_v, anchors, starts=starts, **options)

        inputs = [_QUERIES, _CONTEXT, _CONTEXT, _ROWS, _ROWS, _PLACES, _PLACES]
        out = per_shard(on_shard, inputs, _QUERIES)(
            turned(q), ctx_k, ctx_v, copied(turned(k)), copied(v), anchors, starts
        )
        return out.reshape(B, A, W, -1)

    def run(i: int, layer: DrafterLayer, x: Array) -> Array:
        with jax.named_scope(f"draft{i}"):
            return constrain(layer(x, partial(attend, i)), "batch", "...")

    x = constrain(embedded * c.input_embedding_scale, "batch", "...")
    for i, layer in enumerate(drafter.layers):
        step = partial(run, i, layer)
        x = (jax.checkpoint(step) if remat else step)(x)
    return drafter.norm(x)
