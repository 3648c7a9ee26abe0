"""Where the drafter's training blocks start, and what each of their rows has to predict."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pallas_kernels.documents import document_starts

_NONE = jnp.iinfo(jnp.int32).max  # the document of what cannot be an anchor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A training blocks a sequence; W rows each, row 0 is the anchor's own token.

    Row w of block a predicts the token at `anchors[b, a] + w`, so row 0's weight is 0. The block's document begins at
    `starts[b, a]`.
    """

    anchors: Int[Array, "B A"]
    starts: Int[Array, "B A"]
    inputs: Int[Array, "B A W"]
    labels: Int[Array, "B A W"]
    weights: Float[Array, "B A W"]


def valid_anchors(loss_mask: Bool[Array, "B T"], segments: Int[Array, "B T"] | None = None) -> Bool[Array, "B T"]:
    """Position p can be an anchor when p and p + 1 both count in the loss, and are of one document."""
    valid = loss_mask & jnp.pad(loss_mask[:, 1:], ((0, 0), (0, 1)))
    if segments is None:
        return valid
    return valid & jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))


def sample_anchors(
    key: Key[Array, ""],
    loss_mask: Bool[Array, "B T"],
    count: int,
    segments: Int[Array, "B T"] | None = None,
    rows: Int[Array, "B"] | None = None,
) -> tuple[Int[Array, "B A"], Bool[Array, "B A"]]:
    """`count` different valid positions a sequence (at most T), ascending, and which of them are real.

    Each document of a row gets its share, in proportion to its valid positions, and at least one if there are enough.
    What is drawn depends on the key and the row's number in the global batch (`rows`, default 0, 1, ...), and neither
    on the mesh nor on how the batch is cut into parts.
    """
    B, T = loss_mask.shape
    valid = valid_anchors(loss_mask, segments)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(B) if rows is None else rows)
    draws = jax.vmap(lambda k: jax.random.uniform(k, (T,)))(keys)
    documents = jnp.where(valid, 0 if segments is None else segments, _NONE)
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    documents, negative, at = jax.lax.sort((documents.astype(jnp.int32), -draws, at), dimension=1, num_keys=2)
    draws, first = -negative, document_starts(documents)
    last = T - 1 - jnp.flip(document_starts(jnp.flip(documents, 1)), 1)
    rank, size = jnp.arange(T) - first, last - first + 1
    order = jnp.where(rank == 0, draws - 2, (rank + draws) / size)  # one of each document before all others
    order = jnp.where(documents == _NONE, jnp.inf, order)
    best, places = jax.lax.top_k(-order, min(count, T))
    anchors, real = jnp.take_along_axis(at, places, 1), best > -jnp.inf
    ascending = jnp.argsort(anchors, -1)
    return jnp.take_along_axis(anchors, ascending, -1), jnp.take_along_axis(real, ascending, -1)


def next_anchors(
    anchors: Int[Array, "B A"],
    real: Bool[Array, "B A"],
    accepted: Int[Array, "B A"],
    loss_mask: Bool[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Int[Array, "B A"], Bool[Array, "B A"]]:
    """Where decoding goes on after verification accepted so many rows of each block: at the token that corrected it.

    Ascending; a position that two blocks lead to is real once, and none behind the end of its document is.
    """
    T = loss_mask.shape[1]
    after = anchors + accepted + 1
    inside = jnp.minimum(after, T - 1)
    real = real & (after < T) & jnp.take_along_axis(valid_anchors(loss_mask, segments), inside, 1)
    if segments is not None:
        real &= jnp.take_along_axis(segments, inside, 1) == jnp.take_along_axis(segments, anchors, 1)
    after = jnp.sort(jnp.where(real, after, T), -1)
    repeated = jnp.pad(after[:, 1:] == after[:, :-1], ((0, 0), (1, 0)))
    return jnp.minimum(after, T - 1), (after < T) & ~repeated


def cut_blocks(
    tokens: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    anchors: Int[Array, "B A"],
    real: Bool[Array, "B A"],
    segments: Int[Array, "B T"] | None = None,
    *,
    rows: int,
    mask_token: int,
) -> Blocks:
    """Inputs [anchor, MASK, ...] and labels of the blocks. Weights are 1 where a row has a label that counts.

    A row counts while all rows before it do: the loss mask never restarts inside a block, and no row of the next
    document counts.
    """
    T = tokens.shape[1]
    positions = anchors[..., None] + jnp.arange(rows)
    inside = jnp.minimum(positions, T - 1)

    def at_positions(x: Array) -> Array:
        return jnp.take_along_axis(x, inside.reshape(x.shape[0], -1), 1).reshape(positions.shape)

    labels = at_positions(tokens)
    counts = at_positions(loss_mask) & (positions < T) & real[..., None]
    starts = jnp.zeros_like(anchors)
    if segments is not None:
        starts = jnp.take_along_axis(document_starts(segments), anchors, 1)
        counts &= at_positions(segments) == jnp.take_along_axis(segments, anchors, 1)[..., None]
    counts = jnp.cumprod(counts, -1).astype(jnp.float32).at[..., 0].set(0.0)
    inputs = jnp.where(jnp.arange(rows) == 0, labels, mask_token)
    return Blocks(anchors, starts, inputs, labels, counts)
