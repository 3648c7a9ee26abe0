"""Set before jax is imported: the CPU, one torch thread, and programs that are compiled with less effort.

The models of the tests run for milliseconds and compile for seconds. A compilation cache on disk brings nothing here: a
process hardly compiles one program twice, and workers that share a folder may read what another is still writing.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {os.environ.get('XLA_FLAGS', '')}".strip()
