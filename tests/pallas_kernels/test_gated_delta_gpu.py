"""The GPU kernels on a GPU or under Mosaic GPU's interpreter, and their lowering."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta import cases, gated_delta_block, gated_delta_prefill, gpu, reference
from tests.pallas_kernels.device import running_kernels
from tests.pallas_kernels.gated_delta_rounds import Rounds, Shape, rows

SHAPE = Shape(Hk=1, r=2, Dk=128, Dv=128, B=2)
LENGTHS = [[2, 1, 4, 2], [3, 6]]  # of two sequences' documents


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with running_kernels(monkeypatch):
        yield


def rounds(*, fast_decay: bool = False) -> Rounds:
    # Traced anew each time, as what is traced may have been broken.
    kernels = (jax.jit(partial(kernel)) for kernel in (gpu.gated_delta_block, gpu.gated_delta_prefill))
    return Rounds(SHAPE, 3, np.random.default_rng(1), *kernels, fast_decay=fast_decay)


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("fast_decay", [False, True])
def test_rounds_of_random_paths_equal_the_rule_row_by_row(fast_decay):
    run = rounds(fast_decay=fast_decay)
    run.run_prefill(5, [5, 2])
    for _ in range(3):
        run.run_block(3, tree=False)
    run.run_prefill(5, [1, 0])
    run.run_block(3, tree=False)


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("interpreted")
def test_a_state_that_is_not_decayed_is_noticed(monkeypatch):
    monkeypatch.setattr(gpu, "_softplus", lambda x: 0.0 * x)
    run = rounds()
    with pytest.raises(AssertionError):
        run.run_block(3, tree=False)


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("interpreted")
def test_prefill_of_packed_documents_equals_the_reference():
    """The first document goes on from what is given; state and convolution begin anew with each other one."""
    run = rounds()
    run.run_block(3, tree=False)
    given = [run.state, run.pending, run.tail, *map(jnp.asarray, (*rows(SHAPE, run.rng, 9), *run.weights))]
    documents = jnp.asarray([np.repeat(np.arange(len(lengths)) + 1, lengths) for lengths in LENGTHS])
    given = (*given, jnp.asarray([9, 9]), documents)
    found, right = jax.jit(gpu.gated_delta_prefill)(*given), jax.jit(reference.gated_delta_prefill)(*given)
    for x, y in zip(found, right, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["batch 32, W 64", "batch 1, W 1", "batch 32, prefill 2048"])
@pytest.mark.parametrize("model", cases.MODELS)
def test_real_sizes_lower_to_the_kernel_from_here(model, name):
    (case,) = (case for case in cases.cases() if case.name == f"gated delta: {model}, {name}")
    text = jax.export.export(jax.jit(case.call(None)), platforms=["cuda"])(*case.arguments).mlir_module()
    assert "mosaic_gpu" in text


def test_trees_run_the_reference():
    given = cases.arguments(1, 4, 4, 2, 4)
    parents = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    text = jax.export.export(jax.jit(gated_delta_block), platforms=["cuda"])(*given, parents).mlir_module()
    assert "mosaic_gpu" not in text


def test_packed_documents_lower_to_the_kernel():
    (case,) = (case for case in cases.cases() if case.name.endswith("35B-A3B, batch 1, prefill 2048, packed"))
    text = jax.export.export(jax.jit(gated_delta_prefill), platforms=["cuda"])(*case.arguments).mlir_module()
    assert "mosaic_gpu" in text
