"""Set before jax is imported: the CPU, one torch thread, and programs that are compiled with the least effort.

The models of the tests run for milliseconds and compile for seconds, most of which go into LLVM, the newer code
generator of fusions, and cutting programs into pieces for many cores; without these, the suite takes half the time.
`XLA_FLAGS` of your own replace that, also empty ones: so the short leg compiles as a user's program does. A
compilation cache on disk brings nothing here: a process hardly compiles one program twice, and workers that share a
folder may read what another is still writing.
"""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
LEAST_EFFORT = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # later ones have only the newer generator, and end at a flag unknown to them
    LEAST_EFFORT += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", LEAST_EFFORT)

MOST_MAPPINGS = 20_000
gc.set_threshold(100_000, 20, 50)  # tracing makes many objects and little garbage: looking for it took 7% of the time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: what two workers have left to share at the end are files of seconds.

    The others as they are found, so that neighbours, which often need the same programs, run one after the other.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """After a file: forget compiled programs where there are many.

    Each has memory mappings of its own, of which Linux gives a process 65,530; with one more it is killed.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def children_share_programs(programs) -> Iterator[None]:
    """Processes that a file's tests start keep what they compile for those after them; this one has no such cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", programs)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        yield
