"""The GPU kernel on a GPU or in Mosaic GPU's interpreter, and its lowering at the sizes of real models."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import gpu, grouped_matmul, grouped_pair
from tests.pallas_kernels.device import by_the_interpreter, running_kernels

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with running_kernels(monkeypatch):
        yield


def some(rows: int, experts: int, inputs: int, outputs: int, pairs: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = (rows, inputs), (experts, pairs, inputs, outputs)
    x, kernels = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    return x, kernels


def truth(x: jax.Array, kernels: jax.Array, sizes: list[int]) -> np.ndarray:
    expert = np.repeat(np.arange(len(sizes)), sizes)
    rows, kernels = (np.asarray(y, np.float64) for y in (x, kernels))
    return np.einsum("rd,rpdf->rpf", rows[: len(expert)], kernels[expert])


CASES = {
    "few rows, most groups empty": ([0, 3, 0, 0, 1, 0], 6),
    "groups of many tiles": ([70, 0, 129, 8], 207),
    "rows of no group at the end": ([5, 0, 9], 20),
    "no group has rows": ([0, 0, 0], 4),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pairs", [1, 2])
def test_equals_each_row_times_its_kernel(interpreted: None, name: str, pairs: int):
    sizes, rows = CASES[name]
    x, kernels = some(rows, len(sizes), 128, 256, pairs)
    found = np.asarray(gpu.grouped(x, kernels, jnp.asarray(sizes)), np.float64)
    assert found.shape == (rows, pairs, 256)
    wanted = truth(x, kernels, sizes)
    np.testing.assert_allclose(found[: sum(sizes)], wanted, rtol=1e-2, atol=2e-2)


def test_kernels_without_rows_are_not_read(interpreted: None):
    x, kernels = some(6, 4, 64, 128, 1)
    sizes = [0, 2, 0, 4]
    spoilt = jnp.where((jnp.asarray(sizes) > 0)[:, None, None, None], kernels, jnp.nan)
    found = np.asarray(gpu.grouped(x, spoilt, jnp.asarray(sizes)), np.float64)
    np.testing.assert_allclose(found, truth(x, kernels, sizes), rtol=1e-2, atol=2e-2)


def test_gradients_are_those_of_the_products(interpreted: None):
    x, kernels = some(9, 3, 64, 128, 2)
    sizes = jnp.asarray([4, 0, 5])

    def loss(call, x, kernels):
        return jnp.sum(call(x, kernels, sizes).astype(jnp.float32) ** 2)

    got = jax.grad(lambda *given: loss(gpu.grouped, *given), (0, 1))(x, kernels)
    plain = lambda x, kernels, sizes: grouped_pair(x, kernels, sizes, implementation="reference")  # noqa: E731
    wanted = jax.grad(lambda *given: loss(plain, *given), (0, 1))(x, kernels)
    for one, other in zip(got, wanted, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.abs(one - other).max() <= 2e-2 * np.abs(other).max()


@by_the_interpreter
def test_a_group_that_writes_over_the_next_is_noticed(interpreted: None, monkeypatch: pytest.MonkeyPatch):
    honest = gpu._layout

    def wider(*given):
        slots, table = honest(*given)
        return slots, table.at[2].set(jnp.where(table[2] > 0, gpu.ROWS, 0))[:, ::-1]  # later groups first

    monkeypatch.setattr(gpu, "_layout", wider)
    x, kernels = some(6, 2, 64, 128, 1)
    found = np.asarray(gpu.grouped(x, kernels, jnp.asarray([3, 3])), np.float64)
    assert np.abs(found - truth(x, kernels, [3, 3])).max() > 0.1


REAL = [
    ("Qwen3.5-397B-A17B", 512, 10, 4096, 1024),
    ("Qwen3.5-35B-A3B", 256, 8, 2048, 512),
    ("gpt-oss-120b", 128, 4, 2880, 2880),
]


@pytest.mark.parametrize(("name", "experts", "top_k", "model", "width"), REAL)
@pytest.mark.parametrize("rows", [1, 16, 2048])
def test_lowers_at_real_sizes(name: str, experts: int, top_k: int, model: int, width: int, rows: int):
    half = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    R = rows * top_k
    for call, given in (
        (grouped_pair, (half(R, model), half(experts, 2, model, width), sizes)),
        (grouped_matmul, (half(R, width), half(experts, width, model), sizes)),
    ):
        text = jax.export.export(jax.jit(call), platforms=["cuda"])(*given).mlir_module()
        assert "mosaic_gpu" in text


def test_what_it_does_not_take_runs_the_reference():
    x, kernels = some(4, 2, 64, 128, 1)
    text = jax.export.export(jax.jit(grouped_matmul), platforms=["cuda"])(
        x.astype(jnp.float32), kernels[:, 0].astype(jnp.float32), jnp.asarray([1, 3])
    ).mlir_module()
    assert "mosaic_gpu" not in text
