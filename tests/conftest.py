"""Set before jax is imported: the CPU, one torch thread, and programs that are compiled with less effort.

The models of the tests run for milliseconds and compile for seconds. A compilation cache on disk brings nothing here: a
process hardly compiles one program twice, and workers that share a folder may read what another is still writing.
"""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {os.environ.get('XLA_FLAGS', '')}".strip()


def pytest_collection_modifyitems(items):
    """All tests of a file go to one worker, which compiles what they share once; a group may span files."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
