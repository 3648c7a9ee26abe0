"""Whether a GPU is here: then tests run the kernels themselves on it, and Mosaic GPU's interpreter where there is none.

`JAX_PLATFORMS=cuda XLA_FLAGS= python -m pytest tests/pallas_kernels -k gpu`
"""

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # has no public name yet

ON_GPU = jax.default_backend() == "gpu"
INTERPRET = None if ON_GPU else InterpretGPUParams()
by_the_interpreter = pytest.mark.skipif(ON_GPU, reason="breaks a kernel in a way that only the interpreter survives")
