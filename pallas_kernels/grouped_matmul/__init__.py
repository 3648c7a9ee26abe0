"""Rows grouped by expert, one product a group."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch, tuning

VMEM = 16 << 20  # bytes that the compiler gives one kernel on v5e, v5p and v6e


def grouped_matmul(
    rows: Float[Array, "R D"],
    kernels: Float[Array, "E D F"],
    sizes: Int[Array, "E"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "R F"]:
    """The first `sizes[0]` rows times the first kernel, and so on; rows beyond the last group hold anything.

    TPU: megablox `gmm` of jax, which reads only the experts that have rows. Else, and where sizes do not tile,
    `jax.lax.ragged_dot`; for a kernel of our own for GPUs, rows lie otherwise: see `gpu.Slots`.
    """
    tiles = all(size % 128 == 0 for size in kernels.shape[1:])
    return dispatch(
        implementation, rows, kernels, sizes.astype(jnp.int32), reference=jax.lax.ragged_dot,
        tpu=_megablox if tiles else None,
    )  # fmt: skip


def grouped_pair(
    rows: Float[Array, "R D"],
    kernels: Float[Array, "E 2 D F"],
    sizes: Int[Array, "E"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "R 2 F"]:
    """Both kernels of every group, as `grouped_matmul`, without a copy of the kernels on accelerators.

    On TPUs they are a list of 2 E kernels, of which each product finds every other one without rows, and passes on.
    """
    tiles = all(size % 128 == 0 for size in kernels.shape[2:])
    return dispatch(
        implementation, rows, kernels, sizes.astype(jnp.int32), reference=_one_product,
        tpu=_two_products if tiles else None,
    )  # fmt: skip


def _two_products(rows: Array, kernels: Array, sizes: Array) -> Array:
    listed, none = kernels.reshape(-1, *kernels.shape[2:]), jnp.zeros_like(sizes)
    counts = (jnp.stack(pair, 1).reshape(-1) for pair in ((sizes, none), (none, sizes)))
    return jnp.stack([_megablox(rows, listed, count) for count in counts], 1)


def _one_product(rows: Array, kernels: Array, sizes: Array) -> Array:
    E, _, D, F = kernels.shape
    side_by_side = kernels.swapaxes(1, 2).reshape(E, D, 2 * F)
    return jax.lax.ragged_dot(rows, side_by_side, sizes).reshape(-1, 2, F)


def _megablox(rows: Array, kernels: Array, sizes: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    R, (_, D, F) = len(rows), kernels.shape
    few, tile_d, tile_f = tiling(R // len(kernels), D, F, rows.dtype.itemsize)
    padded = jnp.pad(rows, ((0, -R % few), (0, 0)))
    return gmm(padded, kernels, sizes, preferred_element_type=rows.dtype, tiling=(few, tile_d, tile_f))[:R]


def tiling(rows_per_expert: int, D: int, F: int, item: int) -> tuple[int, int, int]:
    """Tile sizes: as many rows as an expert is likely to have, and the largest parts of its matrix that divide it.

    Tiles of numbers of `item` bytes, two of each and the sums, have to fit the `VMEM` that a kernel may take.
    """
    sizes = tuning(__file__)["default"]
    rows = next((n for n in sizes["rows"] if n >= rows_per_expert), sizes["rows"][-1])
    tile_f = _largest(F, sizes["F"])
    rest = VMEM - (2 * item + 2 * 4) * rows * tile_f
    return rows, _largest(D, min(sizes["D"], rest // (2 * item * (rows + tile_f)))), tile_f


def _largest(size: int, most: int) -> int:
    return max(n for n in range(128, min(size, most) + 1, 128) if size % n == 0)
