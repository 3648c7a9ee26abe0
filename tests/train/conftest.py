from collections.abc import Iterator

import pytest

from dflash_jax.models.target import Target
from tests.train import small


@pytest.fixture(scope="session")
def target() -> Target:
    return small.target()


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
