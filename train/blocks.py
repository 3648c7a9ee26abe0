"""The drafter's training forward: many blocks of one sequence in a single pass over its shared context."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dflash_jax.models.drafter import Drafter
from dflash_jax.models.layers import Rotation, rotate, rotation
from pallas_kernels.anchored_attention import anchored_attention


def context_features(drafter: Drafter, taps: Float[Array, "B T CD"]) -> Float[Array, "B T D"]:
    """One fused feature a position, which serves every layer."""
    return drafter.hidden_norm(drafter.fc(taps))


def keys_values(
    drafter: Drafter, layer: int, x: Float[Array, "B T D"], turn: Rotation
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """One layer's rotated keys, and values: the same projection for context features and for block rows."""
    c = drafter.config
    kv = jnp.einsum("btd,dce->btce", x, drafter.kv_proj.kernel[...][layer].astype(x.dtype))
    if c.attention_bias:
        kv = kv + drafter.kv_proj.bias[...][layer].astype(x.dtype)
    kv = kv.reshape(*kv.shape[:3], c.num_kv_heads, c.head_dim)
    return rotate(drafter.layers[layer].attention.k_norm(kv[:, :, 0]), turn), kv[:, :, 1]


def block_hidden(
    drafter: Drafter,
    embedded: Float[Array, "B A W D"],
    taps: Float[Array, "B T CD"],
    anchors: Int[Array, "B A"],
) -> Float[Array, "B A W D"]:
    """Hidden states of all blocks after the final norm.

    Row w of block a stands at position `anchors[b, a] + w`, and sees context strictly before `anchors[b, a]`.
    """
    c = drafter.config
    B, A, W, D = embedded.shape
    features = context_features(drafter, taps)
    at = jnp.broadcast_to(jnp.arange(taps.shape[1]), taps.shape[:2])
    context_turn = rotation(at, c.rope, embedded.dtype)
    block_turn = rotation((anchors[..., None] + jnp.arange(W)).reshape(B, A * W), c.rope, embedded.dtype)

    x = embedded.reshape(B, A * W, D) * c.input_embedding_scale
    for index, layer in enumerate(drafter.layers):
        normed = layer.input_norm(x)
        q = layer.attention.q_norm(layer.attention.q_proj(normed).reshape(B, A * W, c.num_heads, c.head_dim))
        mixed = anchored_attention(
            _blocks(rotate(q, block_turn), A),
            *keys_values(drafter, index, features, context_turn),
            *(_blocks(own, A) for own in keys_values(drafter, index, normed, block_turn)),
            anchors,
            causal=c.causal[index],
            window=c.sliding_window if c.layer_types[index] == "sliding_attention" else None,
            scale=c.head_dim**-0.5,
        )
        x = x + layer.attention.o_proj(mixed.reshape(B, A * W, c.num_heads * c.head_dim))
        x = x + layer.mlp(layer.post_norm(x))
    return drafter.norm(x).reshape(B, A, W, D)


def _blocks(x: Float[Array, "B R N H"], count: int) -> Float[Array, "B A W N H"]:
    return x.reshape(x.shape[0], count, -1, *x.shape[2:])
