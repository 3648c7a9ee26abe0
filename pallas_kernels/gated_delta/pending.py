"""What a block of rows leaves behind, and the rows of it that were accepted: the commit is deferred to the next call.

A rejected row costs nothing to drop, and the state is read and written once a round: the next block folds the accepted
rows into it before its own rows run.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pending:
    """Accepted rows that the state does not hold yet: S = fold * S + sum_p weight_p k_p u_p^T.

    Rows of weight 0 do not exist and may hold anything. k and u stand in the dtype of the activations: rounding u
    costs no more than v's own rounding did, and halves what a round moves beside the state.
    """

    k: Float[Array, "B Hk P Dk"]
    u: Float[Array, "B Hv P Dv"]
    weight: Float[Array, "B Hv P"]
    fold: Float[Array, "B Hv"]

    @classmethod
    def empty(
        cls, batch: int, rows: int, k_heads: int, v_heads: int, k_dim: int, v_dim: int, dtype: jnp.dtype = jnp.float32
    ) -> "Pending":
        return cls(
            k=jnp.zeros((batch, k_heads, rows, k_dim), dtype),
            u=jnp.zeros((batch, v_heads, rows, v_dim), dtype),
            weight=jnp.zeros((batch, v_heads, rows)),
            fold=jnp.ones((batch, v_heads)),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What a block leaves behind so that any accepted path through it can be committed later."""

    k: Float[Array, "B Hk W Dk"]
    u: Float[Array, "B Hv W Dv"]
    decay: Float[Array, "B Hv W"]  # G: log-decay from the state along the row's path to the row

    def commit(self, count: Int[Array, "B"], path: Int[Array, "B N"] | None = None) -> Pending:
        """The first `count[b]` rows of the path become pending, none for 0; without a path, of the block itself.

        A path names rows from the block's first one down to a descendant. Entries past its count are not read.
        """
        kept = _on_path(count, path, self.decay.shape[-1])[:, None]
        last = jnp.min(jnp.where(kept, self.decay, 0.0), -1)  # decay falls along a path, so its least is the last's
        weight = jnp.where(kept, jnp.exp(jnp.where(kept, last[..., None] - self.decay, 0.0)), 0.0)
        return Pending(k=self.k, u=self.u, weight=weight, fold=jnp.exp(last))


def _on_path(count: Array, path: Array | None, rows: int) -> Bool[Array, "B W"]:
    if path is None:
        return jnp.arange(rows) < count[:, None]
    taken = jnp.arange(path.shape[1]) < count[:, None]
    return jnp.any((path[:, :, None] == jnp.arange(rows)) & taken[:, :, None], 1)


def conv_tail(
    tail: Float[Array, "B R Hk C"],
    mixed: Float[Array, "B W Hk C"],
    count: Int[Array, "B"],
    path: Int[Array, "B N"] | None = None,
) -> Float[Array, "B R Hk C"]:
    """The last R inputs of the convolution once the first `count[b]` rows (of the path) are committed."""
    R = tail.shape[1]
    at = count[:, None] + jnp.arange(R)  # in the tail and then the rows
    row = jnp.maximum(at - R, 0)
    row = row if path is None else jnp.take_along_axis(path, row, 1)
    old, new = (
        jnp.take_along_axis(x, index[:, :, None, None], 1, mode="clip")
        for x, index in ((tail, jnp.minimum(at, R - 1)), (mixed, row))
    )
    return jnp.where((at < R)[:, :, None, None], old, new)
