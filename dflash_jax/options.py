"""Command-line options from a frozen dataclass: one field, one option."""

import argparse
import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

from dflash_jax.errors import InputError

T = TypeVar("T")


def option(default: Any, help: str, *, metavar: str | None = None) -> Any:  # `help` as in argparse
    """A dataclass field with the text that `--help` shows for it."""
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar})


def parser_for(options: type, prog: str, *, exit_on_error: bool = False) -> ArgumentParser:
    """A parser for a dataclass of `option` fields, described by the class docstring.

    `max_tokens: int` is `--max-tokens N`; a bool is a flag, `--name` or, where it is True by default, `--no-name`; a
    tuple collects a repeated option. Bad values raise argparse.ArgumentError, or end the program with `exit_on_error`.
    """
    parser = ArgumentParser(
        prog=prog,
        description=options.__doc__,
        exit_on_error=exit_on_error,
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        flag, text = field.name.replace("_", "-"), field.metadata["help"]
        kind = _value_type(hints[field.name])
        if kind is bool:
            flag, action = (f"no-{flag}", "store_false") if field.default else (flag, "store_true")
            parser.add_argument(f"--{flag}", dest=field.name, action=action, help=text)
            continue
        repeated: dict[str, Any] = {"action": "append", "default": []}
        once: dict[str, Any] = {"default": field.default}
        values = repeated if typing.get_origin(hints[field.name]) is tuple else once
        text += "" if field.default in (None, ()) else f" (default {field.default})"
        parser.add_argument(f"--{flag}", type=kind, metavar=field.metadata["metavar"], help=text, **values)
    return parser


def read_options(options: type[T], values: Any) -> T:
    """The dataclass that the parsed namespace describes."""
    given = {field.name: getattr(values, field.name) for field in dataclasses.fields(options)}  # pyrefly: ignore
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def numbers(text: str, name: str, number: Callable[[str], Any]) -> list[Any]:
    """Those of an option with commas, as in 1,4,16; `number` reads one. InputError for what are none above 0."""
    try:
        found = [number(part) for part in filter(None, text.split(","))]
    except ValueError:
        found = [-1]
    if not all(0 < x < float("inf") for x in found):
        raise InputError(f"{name} is {text!r}; give numbers above 0 with commas between them, as in 1,4,16")
    return found


def _value_type(hint: Any) -> Any:
    """`int` for int, int | None and tuple[int, ...]."""
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0]
    if isinstance(hint, types.UnionType):
        return functools.reduce(operator.or_, (kind for kind in typing.get_args(hint) if kind is not type(None)))
    return hint
