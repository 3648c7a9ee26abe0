"""Writing a model as a Hugging Face folder: config.json and safetensors, one tensor in memory at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dflash_jax.checkpoints.drafter_table import drafter_table
from dflash_jax.checkpoints.safetensors_file import DTYPES, Pending, write_folder
from dflash_jax.checkpoints.table import Leaf, Piece
from dflash_jax.checkpoints.target_table import target_table
from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target

SHARD_BYTES = 5 * 10**9
_WRITABLE = ("BF16", "F16", "F32")


def save_target(
    target: Target, folder: str | Path, dtype: jnp.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a target in the layout that transformers loads.

    Args:
        dtype: of the weights, by default the model's own; leaves that stay float32 in any model (A_log, dt_bias) do so.
        shard_bytes: a larger model is written as several files with an index.

    Raises:
        InputError: a dtype other than bfloat16, float16 or float32.
    """
    model_dtype = target.embed.embedding.dtype
    _save(target, folder, target.config.to_dict(), target_table(target.config), "model.", model_dtype, dtype, shard_bytes)


def save_drafter(
    drafter: Drafter, folder: str | Path, dtype: jnp.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a drafter in the published layout; arguments and errors as for `save_target`."""
    model_dtype = drafter.fc.kernel.dtype
    _save(drafter, folder, drafter.config.to_dict(), drafter_table(drafter.config), "", model_dtype, dtype, shard_bytes)


def _save(
    model: nnx.Module,
    folder: str | Path,
    config: dict[str, Any],
    table: list[Leaf],
    prefix: str,
    model_dtype: jnp.dtype,
    dtype: jnp.dtype | None,
    shard_bytes: int,
) -> None:
    dtype = np.dtype(model_dtype if dtype is None else dtype)
    if dtype not in [DTYPES[name] for name in _WRITABLE]:
        raise InputError(f"checkpoints are not written in {dtype}; give bfloat16, float16 or float32")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    write_folder(folder, _pending(flat, table, prefix, np.dtype(model_dtype), dtype), shard_bytes)
    text = json.dumps(config | {"dtype": dtype.name}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _pending(
    flat: dict[str, Any], table: list[Leaf], prefix: str, model_dtype: np.dtype, dtype: np.dtype
) -> Iterator[Pending]:
    for leaf in table:
        array = flat[leaf.path].get_value()
        # Leaves that differ from the model's dtype are float32 for a reason; they keep it.
        written = dtype if array.dtype == model_dtype else np.dtype(array.dtype)
        for piece in leaf.layouts[0]:
            key = piece.key if piece.key.startswith("lm_head.") else prefix + piece.key
            yield Pending(key, piece.shape, written, lambda a=array, p=piece: _tensor(a, p))


def _tensor(array: Any, piece: Piece) -> np.ndarray:
    """The checkpoint tensor that lies in a leaf."""
    leaf = np.asarray(array)
    parts = [view.reshape(-1, *piece.shape[1:]) for view in piece.views(leaf)]
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(piece.shape)
