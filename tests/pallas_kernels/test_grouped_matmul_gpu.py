"""The GPU kernel on a GPU or in Mosaic GPU's interpreter, and its lowering at the sizes of real models."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash_jax.config import MoeConfig
from dflash_jax.models import moe
from dflash_jax.models.moe import Experts
from pallas_kernels.grouped_matmul import gpu
from tests.pallas_kernels.device import by_the_interpreter, running_kernels

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with running_kernels(monkeypatch):
        yield


def some(experts: int, inputs: int, outputs: int, pairs: int, rows: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = (rows, inputs), (experts, pairs, inputs, outputs)
    x, kernels = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    return x, kernels


def product(x: jax.Array, kernels: jax.Array, groups: np.ndarray) -> np.ndarray:
    slots = gpu.Slots.of(jnp.asarray(groups), len(kernels))
    return np.asarray(slots.product(x[slots.source], kernels)[slots.slots], np.float64)


def truth(x: jax.Array, kernels: jax.Array, groups: np.ndarray) -> np.ndarray:
    rows, kernels = (np.asarray(y, np.float64) for y in (x, kernels))
    return np.einsum("rd,rpdf->rpf", rows, kernels[groups])


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=2e-2)


CASES = {
    "few rows, most groups empty": [0, 3, 0, 0, 1, 0],
    "groups of many tiles": [70, 0, 129, 8],
    "rows of no group": [5, 0, 9, 6],  # of which the last is none
    "one row": [0, 1, 0],
}


@pytest.mark.parametrize(
    ("name", "pairs", "few"),
    [(name, i % 2 + 1, [gpu.FEW, 0][i // 2 % 2]) for i, name in enumerate(CASES)] + [("rows of no group", 2, 0)],
)
def test_equals_each_row_times_its_kernel(
    interpreted: None, monkeypatch: pytest.MonkeyPatch, name: str, pairs: int, few: int
):
    monkeypatch.setattr(gpu, "FEW", few)  # ranks by comparison, and by sorting
    sizes = CASES[name]
    groups = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    experts = 3 if name == "rows of no group" else len(sizes)
    x, kernels = some(experts, 128, 256, pairs, len(groups))
    found, inside = product(x, kernels, groups), groups < experts
    assert found.shape == (len(groups), pairs, 256)
    close(found[inside], truth(x[inside], kernels, groups[inside]))


def test_kernels_without_rows_are_not_read(interpreted: None):
    x, kernels = some(4, 64, 128, 1, 6)
    groups = np.asarray([1, 3, 3, 1, 3, 3], np.int32)
    spoilt = kernels.at[np.asarray([0, 2])].set(jnp.nan)
    close(product(x, spoilt, groups), truth(x, kernels, groups))


def test_gradients_are_those_of_the_products(interpreted: None):
    x, kernels = some(3, 64, 128, 2, 9)
    groups = jnp.asarray([0, 2, 2, 0, 2, 0, 2, 2, 0])

    def ours(x: jax.Array, kernels: jax.Array) -> jax.Array:
        slots = gpu.Slots.of(groups, 3)
        return jnp.sum(slots.product(x[slots.source], kernels)[slots.slots].astype(jnp.float32) ** 2)

    def plain(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return jnp.sum(jnp.einsum("rd,rpdf->rpf", x, kernels[groups]).astype(jnp.float32) ** 2)

    for one, other in zip(jax.grad(ours, (0, 1))(x, kernels), jax.grad(plain, (0, 1))(x, kernels), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.abs(one - other).max() <= 2e-2 * np.abs(other).max()


@by_the_interpreter
def test_a_group_that_writes_over_the_next_is_noticed(interpreted: None, monkeypatch: pytest.MonkeyPatch):
    honest = gpu._call

    def wider(s: gpu.Shape, table: jax.Array, *given: jax.Array) -> jax.Array:
        filled = jnp.where(table[2] > 0, gpu.ROWS, 0)
        return honest(s, table.at[2].set(filled)[:, ::-1], *given)  # later groups first

    monkeypatch.setattr(gpu, "_call", wider)
    x, kernels = some(2, 64, 128, 1, 6)
    groups = np.asarray([0, 0, 0, 1, 1, 1], np.int32)
    assert np.abs(product(x, kernels, groups) - truth(x, kernels, groups)).max() > 0.1


REAL = {  # experts, top k, width of the model, of an expert
    "Qwen3.5-397B-A17B": (512, 10, 4096, 1024),
    "Qwen3.5-35B-A3B": (256, 8, 2048, 512),
    "gpt-oss-120b": (128, 4, 2880, 2880),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("rows", [1, 16, 2048])
def test_experts_of_real_sizes_lower_to_the_kernel(name: str, rows: int):
    experts, top_k, model, width = REAL[name]
    config = MoeConfig(experts, top_k, width)
    graph, weights = nnx.split(nnx.eval_shape(lambda: Experts(model, config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))

    def run(weights: nnx.State, x: jax.Array, chosen: jax.Array, share: jax.Array) -> jax.Array:
        return nnx.merge(graph, weights)(x, chosen, share)

    shape = jax.ShapeDtypeStruct
    given = shape((rows, model), jnp.bfloat16), shape((rows, top_k), jnp.int32), shape((rows, top_k), jnp.float32)
    text = jax.export.export(jax.jit(run), platforms=["cuda"])(weights, *given).mlir_module()
    assert text.count("mosaic_gpu_v2") == 2
    assert "ragged_dot" not in text


def test_the_experts_are_those_of_the_reference(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    experts = Experts(128, MoeConfig(9, 2, 128, bias=True), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for p in (experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias):
        p[...] = jnp.asarray(rng.normal(size=p.shape) / 4, p.dtype)
    x, chosen = jnp.asarray(rng.normal(size=(5, 128)), jnp.bfloat16), rng.integers(0, 9, (5, 2)).astype(np.int32)
    weights = jnp.asarray(rng.uniform(size=(5, 2)), jnp.float32)
    wanted = experts(x, jnp.asarray(chosen), weights)
    request.getfixturevalue("interpreted")
    monkeypatch.setattr(moe, "dispatch", lambda _, *given, gpu, moe, **others: gpu(*given, moe=moe))
    found = experts(x, jnp.asarray(chosen), weights)
    wanted, found = (np.asarray(y, np.float64) for y in (wanted, found))
    assert np.abs(found - wanted).max() <= 2e-2 * np.abs(wanted).max()
