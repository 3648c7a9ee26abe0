"""Products of rows with their expert's matrix, where jax's own kernels make them."""

import pytest

from pallas_kernels.grouped_matmul import tiling

# Rows an expert, its matrix, bytes of a number: a training step and a round of published models.
SHAPES = {
    "Qwen3.5-397B-A17B, training": (720, 4096, 1024, 2),
    "Qwen3.5-397B-A17B, training, second product": (720, 1024, 4096, 2),
    "Qwen3.5-397B-A17B, a round": (16, 4096, 1024, 2),
    "Qwen3.5-35B-A3B, training": (1440, 2048, 512, 2),
    "Qwen3-Coder-30B-A3B, training": (1152, 2048, 768, 2),
    "fp32": (720, 4096, 1024, 4),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tiles_divide_the_matrix_and_fit_the_memory(shape: tuple[int, int, int, int]):
    """Two of each tile, the sums in fp32, and a product before it is added to them."""
    _, D, F, item = shape
    rows, tile_d, tile_f = tiling(*shape)
    assert not D % tile_d and not F % tile_f
    assert 2 * item * (rows * tile_d + tile_d * tile_f + rows * tile_f) + 8 * rows * tile_f <= 16 << 20
