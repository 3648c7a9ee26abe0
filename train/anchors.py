"""Where the drafter's training blocks start, and what each of their rows has to predict."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A training blocks a sequence; W rows each, row 0 is the anchor's own token.

    Row w of block a predicts the token at `anchors[b, a] + w`, so row 0's weight is 0.
    """

    anchors: Int[Array, "B A"]
    inputs: Int[Array, "B A W"]
    labels: Int[Array, "B A W"]
    weights: Float[Array, "B A W"]


def valid_anchors(loss_mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Position p can be an anchor when p and p + 1 both count in the loss."""
    return loss_mask & jnp.pad(loss_mask[:, 1:], ((0, 0), (0, 1)))


def sample_anchors(key: Key[Array, ""], loss_mask: Bool[Array, "B T"], count: int) -> tuple[Array, Array]:
    """`count` different valid positions a sequence [B, A], ascending, and which of them are real [B, A]."""
    valid = valid_anchors(loss_mask)
    score = jnp.where(valid, jax.random.uniform(key, loss_mask.shape), -1.0)
    best, anchors = jax.lax.top_k(score, count)
    order = jnp.argsort(anchors, -1)
    return jnp.take_along_axis(anchors, order, -1), jnp.take_along_axis(best >= 0, order, -1)


def decay(rows: int, gamma: float) -> Float[Array, "W"]:
    """Weight exp(-(k - 1) / gamma) of row k >= 1; nothing for the anchor's row."""
    k = jnp.arange(rows)
    return jnp.where(k > 0, jnp.exp(-(k - 1) / gamma), 0.0)


def cut_blocks(
    tokens: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    anchors: Int[Array, "B A"],
    real: Bool[Array, "B A"],
    *,
    rows: int,
    mask_token: int,
) -> Blocks:
    """Inputs [anchor, MASK, ...] and labels of the blocks. Weights are 1 where a row has a label that counts.

    A row counts while all rows before it do: the loss mask never restarts inside a block.
    """
    T = tokens.shape[1]
    positions = anchors[..., None] + jnp.arange(rows)
    inside = jnp.minimum(positions, T - 1)

    def at_positions(x: Array) -> Array:
        return jnp.take_along_axis(x, inside.reshape(x.shape[0], -1), 1).reshape(positions.shape)

    labels = at_positions(tokens)
    counts = at_positions(loss_mask) & (positions < T) & real[..., None]
    counts = jnp.cumprod(counts, -1).astype(jnp.float32).at[..., 0].set(0.0)
    inputs = jnp.where(jnp.arange(rows) == 0, labels, mask_token)
    return Blocks(anchors, inputs, labels, counts)
