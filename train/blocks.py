"""The drafter's training forward: many blocks of one sequence in a single pass over its shared context."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dflash_jax.models.drafter import Drafter
from dflash_jax.models.layers import rotate, rotation
from pallas_kernels.anchored_attention import anchored_attention


def block_hidden(
    drafter: Drafter,
    embedded: Float[Array, "B A W D"],
    taps: Float[Array, "B T CD"],
    anchors: Int[Array, "B A"],
) -> Float[Array, "B A W D"]:
    """Hidden states of all blocks after the final norm.

    Row w of block a stands at position `anchors[b, a] + w`, and sees context strictly before `anchors[b, a]`. Keys and
    values of the context are made once and shared by all blocks of a sequence.
    """
    c = drafter.config
    B, A, W, _ = embedded.shape
    context = drafter.context(taps, jnp.zeros(B, jnp.int32))
    turn = rotation((anchors[..., None] + jnp.arange(W)).reshape(B * A, W), c.rope, embedded.dtype)

    def turned(x: Array) -> Array:
        return rotate(x.reshape(B * A, *x.shape[2:]), turn).reshape(x.shape)

    def attend(i: int, h: Float[Array, "B A W D"]) -> Float[Array, "B A W NH"]:
        q, k, v = drafter.heads(i, h)
        out = anchored_attention(
            turned(q), *context[i], turned(k), v, anchors,
            causal=c.causal[i], window=drafter.window(i), scale=c.head_dim**-0.5,
        )  # fmt: skip
        return out.reshape(B, A, W, -1)

    x = embedded * c.input_embedding_scale
    for i, layer in enumerate(drafter.layers):
        x = layer(x, lambda h, i=i: attend(i, h))
    return drafter.norm(x)
