import pytest

from dflash_jax.models.target import Target
from tests.train import small


@pytest.fixture(scope="session")
def target() -> Target:
    return small.target()
