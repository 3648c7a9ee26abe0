"""Trees of rows: who is an ancestor of whom, and which inputs the convolution of a row sees.

Rows stand in topological order: parents[b, 0] = -1 (the row after the committed tokens), parents[b, i] < i.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def ancestors(parents: Int[Array, "B W"]) -> Bool[Array, "B W W"]:
    """[b, i, j]: row j is row i or lies on the path to it."""
    W = parents.shape[1]
    reached = (parents[:, :, None] == jnp.arange(W)) | jnp.eye(W, dtype=bool)
    steps = 1
    while steps < W - 1:  # twice as far each time
        reached = jnp.einsum("bij,bjk->bik", reached.astype(jnp.float32), reached.astype(jnp.float32)) > 0
        steps *= 2
    return reached


def sources(parents: Int[Array, "B W"], taps: int) -> Int[Array, "B W K"]:
    """[b, i, d]: where the input d tokens before row i stands in the tail's taps - 1 rows and then the block's."""
    tail = taps - 1
    B, W = parents.shape
    before = jnp.concatenate([jnp.broadcast_to(jnp.arange(tail) - 1, (B, tail)), parents + tail], 1)
    at = jnp.broadcast_to(jnp.arange(W) + tail, (B, W))
    found = [at]
    for _ in range(tail):
        at = jnp.take_along_axis(before, at, 1)
        found.append(at)
    return jnp.stack(found, -1)
