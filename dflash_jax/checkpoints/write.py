"""Writing a model as a Hugging Face folder: config.json and safetensors, one tensor in memory at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dflash_jax.checkpoints.safetensors_file import DTYPES, Pending, write_folder
from dflash_jax.checkpoints.table import Leaf, Piece
from dflash_jax.errors import InputError

SHARD_BYTES = 5 * 10**9
_WRITABLE = ("BF16", "F16", "F32")


def write(
    model: nnx.Module,
    folder: str | Path,
    config: dict[str, Any],
    table: list[Leaf],
    prefix: str,
    dtype: jnp.dtype,
    shard_bytes: int,
) -> None:
    """Write every leaf under the keys of `table`, each with `prefix` but the head, and `config` beside them."""
    dtype = np.dtype(dtype)
    if dtype not in [DTYPES[name] for name in _WRITABLE]:
        raise InputError(f"checkpoints are not written in {dtype}; give bfloat16, float16 or float32")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    write_folder(folder, _pending(flat, table, prefix, dtype), shard_bytes)
    text = json.dumps(config | {"dtype": dtype.name}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _pending(flat: dict[str, Any], table: list[Leaf], prefix: str, dtype: np.dtype) -> Iterator[Pending]:
    for leaf in table:
        array = flat[leaf.path].get_value()
        written = np.dtype(np.float32) if leaf.wide else dtype
        for piece in leaf.layouts[0]:
            key = piece.key if piece.key.startswith("lm_head.") else prefix + piece.key
            yield Pending(key, piece.shape, written, lambda a=array, p=piece: _tensor(a, p))


def _tensor(array: Any, piece: Piece) -> np.ndarray:
    """The checkpoint tensor that lies in a leaf."""
    leaf = np.asarray(array)
    parts = [view.reshape(-1, *piece.shape[1:]) for view in piece.views(leaf)]
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(piece.shape)
