"""The GPU kernel on a GPU or in Mosaic GPU's interpreter, and its lowering at the sizes of real models."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.block_attention import gpu
from pallas_kernels.block_attention.cases import cases
from tests.pallas_kernels.blocks import Block
from tests.pallas_kernels.device import ON_GPU, by_the_interpreter, product, running_kernels

pytestmark = pytest.mark.timeout(240)
SHARED_MEMORY = 232_448  # bytes that a block of threads may have on an H100


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not ON_GPU:
        monkeypatch.setattr(gpu, "multiply", lambda x, y, columns, turned: product(x, y, turned))
    with running_kernels(monkeypatch):
        yield


SIZES: dict[str, Any] = {"width": 9, "page": 64, "pages": 3, "dtype": "bfloat16", "head_dim": 64}
BLOCKS = [
    Block((100, 0, 37), **SIZES, heads=6, window=30, sinks=True),
    Block((63, 180), **SIZES, tree=True, soft_cap=4.0, write=False),
    Block((65, 128), **SIZES | {"head_dim": 256, "width": 40}, heads=2, causal=False, paged=False),
    Block((1, 60), **SIZES | {"width": 130}, heads=4, window=70),
    Block((130, 150), **SIZES, kv_heads=4, packed=2, tree=True, window=20, sinks=True, shared_mask=True),
]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
@pytest.mark.parametrize("part", [512, 64])
def test_equals_the_reference(interpreted: None, monkeypatch: pytest.MonkeyPatch, block: Block, part: int):
    monkeypatch.setattr(gpu, "PART", part)  # contexts whole, and split
    expected = np.asarray(block.run(0.0, implementation="reference")[0], np.float64)
    block.check(block.run(implementation="gpu"), expected)


def leak(s: Any, length: Any, split: Any, honest: Any = gpu.part_of) -> Any:
    """A program begins a tile too late."""
    begin, end = honest(s, length, split)
    return begin + 1, end


@by_the_interpreter
def test_a_planted_fault_is_noticed(interpreted: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "part_of", leak)
    with pytest.raises(AssertionError):
        BLOCKS[1].check(BLOCKS[1].run(implementation="gpu"))


REAL = {
    case.name: case for case in cases() if "batch 32, context 1K" in case.name or "batch 1, context 256K" in case.name
}


@pytest.mark.parametrize("name", [name for name in REAL if "W 16" in name and "35B" not in name])
def test_lowers_at_real_sizes(name: str, monkeypatch: pytest.MonkeyPatch):
    bytes_of: list[int] = []
    honest = hopper.swizzled

    def counted(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
        bytes_of.append(int(np.prod(shape)) * jnp.dtype(dtype).itemsize)
        return honest(shape, dtype)

    monkeypatch.setattr(hopper, "swizzled", counted)
    case = REAL[name]
    text = jax.export.export(jax.jit(case.call("gpu")), platforms=["cuda"])(*case.arguments).mlir_module()
    assert "mosaic_gpu" in text
    assert 0 < sum(bytes_of) + 4096 <= SHARED_MEMORY
