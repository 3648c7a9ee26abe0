"""Rows grouped by expert, one product a group: kept libraries, chosen by platform."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch, tuning


def grouped_matmul(
    rows: Float[Array, "R D"],
    kernels: Float[Array, "E D F"],
    sizes: Int[Array, "E"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "R F"]:
    """The first `sizes[0]` rows times the first kernel, and so on; rows beyond the last group hold anything.

    TPU: megablox `gmm` of jax, which reads only the experts that have rows. GPU: `tokamax.ragged_dot` where tokamax is
    installed. Else, and where sizes do not tile, `jax.lax.ragged_dot`.
    """
    tiles = all(size % 128 == 0 for size in kernels.shape[1:])
    return dispatch(
        implementation, rows, kernels, sizes.astype(jnp.int32),
        reference=jax.lax.ragged_dot, tpu=_megablox if tiles else None, gpu=_tokamax(),
    )  # fmt: skip


def _megablox(rows: Array, kernels: Array, sizes: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    R, (_, D, F) = len(rows), kernels.shape
    few, tile_d, tile_f = tiling(R // len(kernels), D, F)
    padded = jnp.pad(rows, ((0, -R % few), (0, 0)))
    return gmm(padded, kernels, sizes, preferred_element_type=rows.dtype, tiling=(few, tile_d, tile_f))[:R]


def tiling(rows_per_expert: int, D: int, F: int) -> tuple[int, int, int]:
    """Tile sizes: as many rows as an expert is likely to have, and the largest parts of its matrix that divide it."""
    sizes = tuning(__file__)["default"]
    rows = next((n for n in sizes["rows"] if n >= rows_per_expert), sizes["rows"][-1])
    return rows, _largest(D, sizes["D"]), _largest(F, sizes["F"])


def _largest(size: int, most: int) -> int:
    return max(n for n in range(128, min(size, most) + 1, 128) if size % n == 0)


def _tokamax() -> partial | None:
    try:
        from tokamax import ragged_dot
    except ImportError:
        return None
    return partial(ragged_dot, implementation="mosaic")
