"""Pallas' interpreters keep the memory of a kernel that failed, which would make the next kernel fail too."""

from collections.abc import Iterator

import pytest
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state  # has no public name yet
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture(autouse=True)
def fresh_interpreters() -> Iterator[None]:
    yield
    pltpu.reset_tpu_interpret_mode_state()
    reset_gpu_interpret_mode_state()
