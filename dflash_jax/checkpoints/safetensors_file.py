"""Safetensors folders, read in pieces and written as a stream, so that memory holds one tensor's part at a time.

The files are read with plain reads, not mapped: mapped pages would count as the process's memory.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from dflash_jax.errors import InputError

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: `start` is the byte at which its data begins."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self, first: int, count: int) -> np.ndarray:
        """`count` elements from element `first` on, in row-major order, flat."""
        dtype = DTYPES[self.dtype]
        values = np.fromfile(self.file, dtype, count, offset=self.start + first * dtype.itemsize)
        if len(values) != count:
            raise InputError(f"{self.file} ended while it was read; copy or download the file again")
        return values


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by key; reads the headers only.

    Raises:
        InputError: no weights, a shard that is missing, cut short or not safetensors, or an index that names a tensor
            its shard does not hold.
    """
    if (folder / SINGLE).is_file():
        return _read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f"found {', '.join(others[:3])}, convert them first" if others else "found no weight files"
        raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}; {found}")
    return _read_shards(folder)


def _read_shards(folder: Path) -> dict[str, Stored]:
    try:
        where = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder / INDEX} is not a safetensors index with a weight_map; download it again") from None
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(where.values())):
        if not (folder / shard).is_file():
            raise InputError(f"{folder} lacks the shard {shard}, which {INDEX} names; download it again")
        tensors |= _read_header(folder / shard)
    for key, shard in where.items():
        if key not in tensors:
            raise InputError(f"{folder / shard} does not hold {key}, which {INDEX} says it does; download it again")
    return tensors


def _read_header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{path} is cut short or not safetensors ({size} bytes); copy or download it again")
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
            tensors = {
                key: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for key, entry in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise InputError(f"{path} has no valid safetensors header; copy or download it again") from None
    needed = 8 + length + max(ends, default=0)
    if size < needed:
        raise InputError(f"{path} is cut short: {size} bytes of {needed}; copy or download it again")
    return tensors


@dataclass(frozen=True)
class Pending:
    """A tensor to write; `make` gives its values when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(folder: Path, tensors: Iterable[Pending], shard_bytes: int) -> None:
    """Write `tensors` as one file, or as shards of at most `shard_bytes` (or one tensor) with their index.

    Weight files of an earlier checkpoint in the folder are removed at the end.
    """
    shards = _shards(list(tensors), shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    if len(shards) > 1:
        where = {tensor.key: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        names.append(INDEX)
    stale = {*folder.glob("model-*-of-*.safetensors"), folder / SINGLE, folder / INDEX} - {folder / n for n in names}
    for path in stale:
        path.unlink(missing_ok=True)


def _shards(tensors: list[Pending], shard_bytes: int) -> list[list[Pending]]:
    shards: list[list[Pending]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _write_file(path: Path, tensors: list[Pending]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.key] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            np.ascontiguousarray(tensor.make(), tensor.dtype).tofile(file)
    unfinished.replace(path)
