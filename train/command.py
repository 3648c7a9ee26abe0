"""What the commands of this package have in common."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jsonargparse

from dflash_jax.errors import InputError
from train.memory import keep_memory

Config = TypeVar("Config")


def command(kind: type[Config], work: Callable[[Config], None]) -> None:
    """Reads a configuration from the command line and does the work; bad input ends in one line."""
    config: Any = jsonargparse.auto_cli(kind, as_positional=False)
    keep_memory()
    try:
        work(config)
    except InputError as error:
        sys.exit(f"error: {error}")
