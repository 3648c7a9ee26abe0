"""What the commands of this package have in common, and `dflash train`."""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse

from dflash_jax.errors import InputError
from train.configuration import read_config, to_yaml
from train.memory import keep_memory

Config = TypeVar("Config")


class _AsWritten(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that begins with the configuration's docstring, in its lines."""


def command(kind: type[Config], work: Callable[[Config], None]) -> None:
    """Reads a configuration from the command line and does the work; bad input ends in one line."""
    module = sys.modules["__main__"].__spec__
    config: Any = jsonargparse.auto_cli(
        kind,
        as_positional=False,
        prog=f"python -m {module.name.removesuffix('.__main__')}" if module else None,
        description=inspect.getdoc(kind),
        formatter_class=_AsWritten,
    )
    keep_memory()
    try:
        work(config)
    except InputError as error:
        sys.exit(f"error: {error}")


def train(what: str, config: str, changes: Sequence[str], *, check: bool) -> int:
    """`dflash train drafter` and `dflash train responses`; the exit status, also 0 where SIGTERM ended it early.

    With `check` the configuration is read, printed and checked, and nothing is done.
    """
    keep_memory()
    from train import processes  # imports jax, seconds

    if not check:
        processes.join()
    from train.checks import check_run
    from train.run import DrafterRun, main, respond

    run = read_config(DrafterRun, Path(config), changes)
    if check:
        print(to_yaml(run), end="", flush=True)
        check_run(run)
        return 0
    done = (main if what == "drafter" else respond)(run)
    if processes.is_first():
        if done:
            print(f"done: {run.out / ('model' if what == 'drafter' else 'responses')}")
        else:
            print(f"stopped before the end, nothing is lost: the same command goes on in {run.out}")
    return 0
