"""`mask_embedding.pt`: a drafter's own embedding of its mask token, in a file that `torch.save` wrote.

The file is a zip archive with a pickle in it. No code of that pickle runs: only the few names that a tensor is made of
are admitted, and each of them stands for a plain description here.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dflash_jax.checkpoints.safetensors_file import DTYPES, Stored
from dflash_jax.errors import InputError

FILE = "mask_embedding.pt"
_STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
_MOST_PICKLE = 2**16  # bytes; the description of one tensor takes 200
_ADVICE = 'save it again with torch.save({"embedding": tensor, "mask_token_id": id})'


@dataclass(frozen=True)
class Held(Stored):
    """A tensor whose values are in memory already."""

    values: np.ndarray

    def read(self, first: int, count: int) -> np.ndarray:
        return self.values[first : first + count]


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the pickle describes it: a part of a storage."""

    dtype: str
    storage: str
    offset: int
    count: int


class _Description(pickle.Unpickler):
    """Reads a pickle that holds dicts, numbers, texts and tensors. UnpicklingError for every other name."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if module_name == "torch" and global_name in _STORAGES:
            return global_name
        known: dict[str, Callable] = {
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "collections.OrderedDict": OrderedDict,
        }
        if name not in known:
            raise pickle.UnpicklingError(f"it asks for {name}")
        return known[name]

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, storage, key, *_ = pid
        return _STORAGES[storage], str(key)


def _tensor(
    storage: tuple[str, str], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> _Tensor:
    count = 1
    for length, stride in reversed(list(zip(shape, strides, strict=True))):
        if length != 1 and stride != count:
            raise pickle.UnpicklingError("its values do not lie side by side")
        count *= length
    return _Tensor(*storage, offset, count)


def read_mask_embedding(file: Path, mask_token: int, dim: int) -> Stored:
    """Return the values, [dim], of the file that lies beside a drafter.

    Raises:
        InputError: not such a file, an embedding of another size or for another mask token, or one for each position.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            found = _read(archive)
            values = found if isinstance(found, _Tensor) else found.get("embedding")
            if not isinstance(values, _Tensor):
                raise InputError(f"{file} has no tensor named embedding; {_ADVICE}")
            _check(file, {} if isinstance(found, _Tensor) else found, values, mask_token, dim)
            array = np.frombuffer(_member(archive, f"data/{values.storage}"), DTYPES[values.dtype])
    except InputError:
        raise
    except Exception as error:  # a broken archive or pickle fails in many ways
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{file} is not a tensor that torch.save wrote ({reason}); {_ADVICE}") from None
    array = array[max(values.offset, 0) :][:dim]
    if len(array) != dim or not np.isfinite(array.astype(np.float32)).all():
        raise InputError(f"{file} is cut short or holds values that are not finite; {_ADVICE}")
    return Held(file, values.dtype, (dim,), 0, array)


def _read(archive: zipfile.ZipFile) -> Any:
    if _member(archive, "byteorder", b"little") != b"little":
        raise ValueError("its numbers are big-endian")
    text = _member(archive, "data.pkl")
    if len(text) > _MOST_PICKLE:
        raise ValueError(f"its pickle has {len(text)} bytes")
    found = _Description(io.BytesIO(text)).load()
    if not isinstance(found, (dict, _Tensor)):
        raise ValueError("it holds no dict and no tensor")
    return found


def _member(archive: zipfile.ZipFile, name: str, default: bytes | None = None) -> bytes:
    """Return the contents of a file below the archive's one folder."""
    path = next((path for path in archive.namelist() if path.partition("/")[2] == name), None)
    if path is None and default is not None:
        return default
    if path is None:
        raise ValueError(f"it has no {name}")
    if (size := archive.getinfo(path).file_size) > 2**26:
        raise ValueError(f"its {name} has {size} bytes")
    return archive.read(path)


def _check(file: Path, said: dict[str, Any], values: _Tensor, mask_token: int, dim: int) -> None:
    if said.get("per_position"):
        raise InputError(f"{file} has an embedding for each position, which is not supported; give one for all of them")
    if (token := said.get("mask_token_id", mask_token)) != mask_token:
        raise InputError(
            f"{file} is for mask token {token}, and config.json says {mask_token}; give the file made for this drafter"
        )
    if values.count != dim:
        raise InputError(f"{file} has {values.count} values and the drafter's hidden size is {dim}; give one for it")


def write_mask_embedding(file: Path, values: np.ndarray, mask_token: int) -> None:
    """Write [dim] values as `torch.save` would; its pickle is put together by hand, as torch need not be there."""
    storage = next(s for s, name in _STORAGES.items() if DTYPES[name] == values.dtype)

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    kept = text("storage") + f"ctorch\n{storage}\n".encode() + text("0") + text("cpu") + number(values.size)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + kept + b"tQ" + number(0) + number(values.size) + b"\x85"
    tensor += number(1) + b"\x85\x89ccollections\nOrderedDict\n)RtR"
    entries = text("embedding") + tensor + text("mask_token_id") + number(mask_token)
    members = {"data.pkl": b"\x80\x02}(" + entries + b"u.", "byteorder": b"little", "data/0": values.tobytes()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, contents in (members | {"version": b"3\n"}).items():
            archive.writestr(f"{file.stem}/{name}", contents)
