"""A run's configuration: a YAML file that describes a dataclass, and `key=value` changes to it."""

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from dflash_jax.errors import InputError

Config = TypeVar("Config")


def read_config(kind: type[Config], path: Path, changes: Sequence[str] = ()) -> Config:
    """The configuration in a file, with `changes` as training.loop.steps=100 applied to it.

    InputError in one line for a file that cannot be read, a key that there is none of, a value of the wrong type.
    """
    values = _read(path)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise InputError(f"{change!r} is no change to the configuration; give key=value, as in training.batch=16")
        _set(values, key, _parse(text, f"the value of {key}"))
    _check_keys(kind, values, str(path))
    return _build(kind, values, path)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"there is no configuration {path}; give a YAML file, for instance one of train/recipes")
    values = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no keys; give a YAML file, for instance one of train/recipes")
    return values


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 6e-4 for a text, because it has no point; here it is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        values = values.setdefault(name, {}) if isinstance(values, dict) else {}
    if isinstance(values, dict):
        values[last] = value


def _check_keys(kind: Any, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
    hints, known = typing.get_type_hints(kind), [field.name for field in dataclasses.fields(kind)]
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            meant = f"did you mean {prefix}{near[0]}? " if near else ""
            place = f"of {prefix.rstrip('.')}" if prefix else "there"
            raise InputError(
                f"{where}: {prefix}{key} is not understood; {meant}the keys {place} are {', '.join(known)}"
            )
        inner = _dataclass_in(hints[key])
        if inner is not None and isinstance(value, Mapping):
            _check_keys(inner, value, where, f"{prefix}{key}.")


def _dataclass_in(hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _build(kind: type[Config], values: dict[str, Any], path: Path) -> Config:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        return kind(**vars(parser.instantiate(parser.parse_object(values))))
    except (TypeError, ValueError, KeyError, argparse.ArgumentError) as error:
        raise InputError(f"{path}: {_short(error)}") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def to_yaml(config: Any) -> str:
    """The whole configuration, defaults included."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
