"""The GPU kernels on a GPU or under Mosaic GPU's interpreter, and their lowering."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta import cases, gated_delta_block, gpu
from tests.pallas_kernels.device import INTERPRET
from tests.pallas_kernels.gated_delta_rounds import Rounds, Shape

SHAPE = Shape(Hk=1, r=2, Dk=128, Dv=128, B=2)
block = jax.jit(partial(gpu.gated_delta_block, interpret=INTERPRET))
prefill = jax.jit(partial(gpu.gated_delta_prefill, interpret=INTERPRET))


@pytest.mark.timeout(200)
@pytest.mark.parametrize("fast_decay", [False, True])
def test_rounds_of_random_paths_equal_the_rule_row_by_row(fast_decay):
    run = Rounds(SHAPE, 3, np.random.default_rng(1), block, prefill, fast_decay=fast_decay)
    run.run_prefill(5, [5, 2])
    for _ in range(3):
        run.run_block(3, tree=False)
    run.run_prefill(5, [1, 0])
    run.run_block(3, tree=False)


@pytest.mark.timeout(200)
def test_a_state_that_is_not_decayed_is_noticed(monkeypatch):
    monkeypatch.setattr(gpu, "_softplus", lambda x: 0.0 * x)
    broken = jax.jit(partial(gpu.gated_delta_block, interpret=INTERPRET))
    run = Rounds(SHAPE, 3, np.random.default_rng(1), broken, prefill)
    with pytest.raises(AssertionError):
        run.run_block(3, tree=False)


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
