"""Lines of JSON as training data: prompts, conversations, and the target's own responses as token ids."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dflash_jax.errors import InputError

MADE_FROM = "made_from.json"  # in a folder: what `claim` has written down
_SCAN = 1 << 26  # bytes looked through at once for line breaks


def line_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and those that end in .jsonl in the folders named. InputError where there is none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist; give JSONL files, or folders that hold some")
        found += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not found:
        raise InputError(f"there are no .jsonl files in {', '.join(map(str, paths)) or 'an empty list of paths'}")
    return found


class JsonLines:
    """Random access to the lines of files, which stay on disk; empty lines are none."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = line_files(paths)
        self._bytes = [np.memmap(path, np.uint8, "r") if path.stat().st_size else _EMPTY for path in self.paths]
        spans = [_line_spans(data) for data in self._bytes]
        self._file = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
        self._span = np.concatenate(spans)

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int) -> Any:
        """What line `index` says. InputError if it is not JSON."""
        file, (start, end) = self._file[index], self._span[index]
        try:
            return json.loads(self._bytes[file][start:end].tobytes())
        except ValueError as error:
            line = int(np.searchsorted(np.flatnonzero(self._file == file), index)) + 1
            raise InputError(f"{self.paths[file]}, line {line}, is not JSON: {error}; mend or remove it") from None


_EMPTY = np.zeros(0, np.uint8)


def _line_spans(data: np.ndarray) -> np.ndarray:
    """(start, end) of every line that has more than white space, [lines, 2]."""
    parts = (np.flatnonzero(data[i : i + _SCAN] == 10) + i for i in range(0, len(data), _SCAN))
    breaks = np.concatenate([np.zeros(0, np.int64), *parts])
    starts, ends = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(data)]])
    full = [bool(data[start:end].tobytes().strip()) for start, end in zip(starts, ends, strict=True)]
    return np.stack([starts, ends], -1)[np.array(full, bool)]


@dataclasses.dataclass(frozen=True)
class Response:
    """What the target made of a prompt: of `tokens`, the first `prompt` are the prompt's."""

    id: int
    prompt: int
    tokens: list[int]
    finish_reason: str


def write_responses(path: Path, responses: Iterable[Response]) -> None:
    """One line each; the file is there whole, and on the disk, or not at all."""
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.writelines(json.dumps(dataclasses.asdict(response)) + "\n" for response in responses)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def check_claim(path: Path, facts: dict[str, Any], what: str, unknown: Sequence[str] = ()) -> None:
    """InputError for a folder that `claim` has given to other facts, but for those that are not known yet."""
    if not path.exists():
        return
    found, given = json.loads(path.read_text()), json.loads(json.dumps(facts))
    names = (found.keys() | given.keys()) - set(unknown)
    if different := sorted(name for name in names if found.get(name) != given.get(name)):
        raise InputError(
            f"{path.parent} holds {what} made with another {', '.join(different)}; give a new folder, or remove it"
        )


def claim(path: Path, facts: dict[str, Any], what: str) -> None:
    """Writes down what a folder is made from, or checks that it is the same; InputError where it differs.

    Work that goes on after a stop must not mix with work of other settings.
    """
    text = json.dumps(facts, indent=1, sort_keys=True)
    if path.exists():
        check_claim(path, facts, what)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)
