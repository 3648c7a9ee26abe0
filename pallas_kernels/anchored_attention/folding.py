"""Inside the TPU kernels: queries side by side in lanes become rows of one product, and who sees what.

Scores are kept as [keys, rows], so that maxima, sums and log-sum-exps of rows are single lane-dense vectors.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.anchored_attention.plan import Plan


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """x and y contracted over one axis each, in fp32; fp32 inputs are not rounded."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def fold(x: jax.Array, plan: Plan) -> jax.Array:
    """[own, heads * H] -> [heads * own, lanes].

    With two heads of size 64 in the lanes, a row has its numbers beside its own KV head and zeros beside the other:
    one product of 128 lanes then does what two of 64 would, and the matrix unit is as busy.
    """
    lanes = plan.lanes
    if plan.packed == 1:
        return jnp.concatenate([x[:, i * lanes : (i + 1) * lanes] for i in range(plan.heads)], 0)
    half = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1) // plan.head
    pieces = []
    for i in range(plan.heads):
        piece, side = x[:, i // 2 * lanes : (i // 2 + 1) * lanes], i // plan.queries
        piece = piece if i % 2 == side else _swap(piece)
        pieces.append(jnp.where(half == side, piece, jnp.zeros_like(piece)))
    return jnp.concatenate(pieces, 0)


def unfold(x: jax.Array, plan: Plan) -> jax.Array:
    """[heads * own, lanes] -> [own, heads * H]."""
    pieces = [x[i * plan.own : (i + 1) * plan.own] for i in range(plan.heads)]
    if plan.packed == 1:
        return jnp.concatenate(pieces, 1)
    pieces = [piece if i % 2 == i // plan.queries else _swap(piece) for i, piece in enumerate(pieces)]
    left = jax.lax.broadcasted_iota(jnp.int32, (1, plan.lanes), 1) < plan.head
    return jnp.concatenate([jnp.where(left, a, b) for a, b in zip(pieces[::2], pieces[1::2], strict=True)], 1)


def _swap(x: jax.Array) -> jax.Array:
    half = x.shape[1] // 2
    return jnp.concatenate([x[:, half:], x[:, :half]], 1)


def _divide(x: jax.Array, by: int) -> jax.Array:
    """x // by for small x >= 0; vectors of integers have no division on a TPU."""
    return jnp.floor((x.astype(jnp.float32) + 0.5) * (1 / by)).astype(jnp.int32)


def columns(plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Of each folded row [1, folded]: its block in the step, and its row in the block."""
    r = jax.lax.broadcasted_iota(jnp.int32, (1, plan.folded), 1)
    place = r - _divide(r, plan.own) * plan.own
    block = _divide(place, plan.rows)
    return block, place - block * plan.rows


def own_mask(plan: Plan, causal: bool, window: int | None) -> jax.Array:
    """[own, folded]: which of the step's own keys a row sees."""
    j = jax.lax.broadcasted_iota(jnp.int32, (plan.own, 1), 0)
    key_block = _divide(j, plan.rows)
    key_row = j - key_block * plan.rows
    block, row = columns(plan)
    seen = (key_block == block) & (key_row < plan.real_rows)
    if causal:
        seen &= key_row <= row
    if window is not None:
        seen &= row - key_row < window
    return seen


def reach(
    anchors: list[jax.Array], starts: list[jax.Array], plan: Plan, window: int | None
) -> tuple[jax.Array, jax.Array]:  # [1, folded] each
    """Each row sees the context positions from the second to before the first."""
    block, row = columns(plan)
    anchor = first = jnp.zeros_like(block)
    for i, (value, start) in enumerate(zip(anchors, starts, strict=True)):
        anchor, first = jnp.where(block == i, value, anchor), jnp.where(block == i, start, first)
    if window is not None:
        first = jnp.maximum(first, anchor + row - window + 1)
    return jnp.minimum(anchor, plan.real_context), first


def context_mask(start: jax.Array, plan: Plan, end: jax.Array, first: jax.Array) -> jax.Array:
    """[tile_context, folded]: which positions of the tile at `start` a row sees."""
    t = start + jax.lax.broadcasted_iota(jnp.int32, (plan.tile_context, 1), 0)
    return (t >= first) & (t < end)


def only(x: jax.Array, seen: jax.Array) -> jax.Array:
    """The tile's positions that some row sees, zeros for the others: those may hold anything."""
    return jnp.where(seen.astype(jnp.float32).max(1, keepdims=True) > 0, x, jnp.zeros_like(x))
