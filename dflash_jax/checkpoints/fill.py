"""Filling a model from a checkpoint, leaf by leaf, in the dtype and on the devices it will run with.

One leaf at a time is built on the host and handed to its devices, so host memory holds at most the largest leaf beside
what the devices keep there.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dflash_jax.checkpoints import mxfp4
from dflash_jax.checkpoints.safetensors_file import DTYPES, Stored
from dflash_jax.checkpoints.table import Leaf, Piece
from dflash_jax.errors import InputError
from dflash_jax.sharding import check_layout, param_axes, placement

Model = TypeVar("Model", bound=nnx.Module)
_CHUNK_BYTES = 64 * 2**20
# Of the vision tower, the multi-token head and buffers: not part of the text model.
_SKIPPED_STARTS = ("visual.", "model.visual.", "mtp.", "model.mtp.")
_SKIPPED_ENDS = ("rotary_emb.inv_freq",)


def without_prefix(
    folder: Path, tensors: dict[str, Stored], prefixes: Sequence[str], landmark: str
) -> dict[str, Stored]:
    """Tensors by the tables' keys, without those of no text model; `landmark` shows which prefix is used."""
    prefix = next((p for p in prefixes if p + landmark in tensors), None)
    if prefix is None:
        accepted = ", ".join(p + landmark for p in prefixes)
        raise InputError(f"{folder}: missing tensor {landmark}, accepted names are {accepted}; found {_some(tensors)}")
    kept = (k for k in tensors if not k.startswith(_SKIPPED_STARTS) and not k.endswith(_SKIPPED_ENDS))
    return {k.removeprefix(prefix).removeprefix("language_model."): tensors[k] for k in kept}


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") if keys else "nothing"


def default_dtype(dtype: jnp.dtype | None, landmark: Stored) -> jnp.dtype:
    """The dtype asked for, or float32 on the CPU and that of the tensor `landmark` on accelerators."""
    if dtype is not None:
        return jnp.dtype(dtype)
    stored = DTYPES.get(landmark.dtype, np.dtype(np.float32))
    return jnp.dtype(np.float32 if jax.default_backend() == "cpu" else stored)


def fill(
    folder: Path, abstract: Model, table: list[Leaf], tensors: dict[str, Stored], mesh: jax.sharding.Mesh | None
) -> Model:
    """The abstract model with every leaf read; everything is checked before the first one is."""
    graph, state = nnx.split(abstract)
    flat = dict(nnx.to_flat_state(state))
    leaves = {leaf.path: leaf for leaf in table}
    paths = {"/".join(map(str, path)): path for path in flat}
    if leaves.keys() != paths.keys():
        raise RuntimeError(f"the name table and the model differ in {sorted(leaves.keys() ^ paths.keys())}")
    chosen = {path: _choose(folder, leaf, tensors) for path, leaf in leaves.items()}
    _check_tensors(folder, [piece for layout in chosen.values() for piece in layout], tensors)
    if mesh is not None:
        check_layout(abstract, mesh)
    for name, path in paths.items():
        variable = flat[path]
        shape = variable.get_value()
        sharding = None if mesh is None else placement(param_axes(variable, shape.shape), shape.shape, mesh)
        flat[path] = variable.replace(_place(_read_leaf(shape, chosen[name], tensors), sharding))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _choose(folder: Path, leaf: Leaf, tensors: dict[str, Stored]) -> tuple[Piece, ...]:
    """The layout of which the checkpoint holds a tensor."""
    found = [layout for layout in leaf.layouts if any(key in tensors for piece in layout for key in piece.keys)]
    if len(found) > 1:
        keys = " and ".join(layout[0].key for layout in found)
        raise InputError(f"{folder}: {keys} are two layouts of the same weights; keep one of them")
    return found[0] if found else leaf.layouts[0]


def _check_tensors(folder: Path, pieces: list[Piece], tensors: dict[str, Stored]) -> None:
    wanted = {key: shape for piece in pieces for key, shape in _stored_shapes(piece).items()}
    missing = [key for key in wanted if key not in tensors]
    if missing:
        also = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(
            f"{folder}: missing tensor {missing[0]}{also}, expected with shape {list(wanted[missing[0]])}; "
            f"found {len(tensors)} tensors; take the weights that belong to this config.json"
        )
    for key, shape in wanted.items():
        _check_tensor(folder, key, shape, tensors[key])
    extra = tensors.keys() - wanted.keys()
    if extra:
        raise InputError(
            f"{folder}: tensors that this config.json has no place for: {_some(extra)}; "
            "take the config.json that belongs to these weights"
        )


def _stored_shapes(piece: Piece) -> dict[str, tuple[int, ...]]:
    if piece.scales is None:
        return {piece.key: piece.shape}
    groups = (*piece.shape[:-1], piece.shape[-1] // mxfp4.GROUP)
    return {piece.key: (*groups, mxfp4.GROUP // 2), piece.scales: groups}


def _check_tensor(folder: Path, key: str, shape: tuple[int, ...], found: Stored) -> None:
    packed = key.endswith(("_blocks", "_scales"))
    accepted = ("U8",) if packed else ("BF16", "F16", "F32", "F64")
    if found.dtype not in accepted:
        raise InputError(
            f"{folder}: tensor {key} has dtype {found.dtype}, accepted are {', '.join(accepted)}; "
            "use the unquantised checkpoint"
        )
    if found.shape != shape:
        raise InputError(f"{folder}: tensor {key} has shape {list(found.shape)}, expected {list(shape)} by config.json")


def _read_leaf(shape: jax.ShapeDtypeStruct, pieces: Sequence[Piece], tensors: dict[str, Stored]) -> np.ndarray:
    size = sum(math.prod(piece.shape) for piece in pieces)
    if size != math.prod(shape.shape):
        raise RuntimeError(f"the pieces from {pieces[0].key} on have {size} elements for a leaf of shape {shape.shape}")
    leaf = np.empty(shape.shape, shape.dtype)
    for piece in pieces:
        _read_piece(leaf, piece, tensors)
    return leaf


def _read_piece(leaf: np.ndarray, piece: Piece, tensors: dict[str, Stored]) -> None:
    """Assign the tensor's values to its views, some rows at a time."""
    first = 0
    for view in piece.views(leaf):
        row = view.size // view.shape[0]
        step = max(1, _CHUNK_BYTES // (4 * row))
        for start in range(0, view.shape[0], step):
            part = view[start : start + step]
            part[...] = _decode(piece, tensors, first, part.size).reshape(part.shape)
            first += part.size


def _decode(piece: Piece, tensors: dict[str, Stored], first: int, count: int) -> np.ndarray:
    if piece.scales is None:
        return tensors[piece.key].read(first, count)
    blocks = tensors[piece.key].read(first // 2, count // 2)
    scales = tensors[piece.scales].read(first // mxfp4.GROUP, count // mxfp4.GROUP)
    return mxfp4.dequantise(blocks, scales)


def _place(leaf: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        value = jax.device_put(leaf)
    else:
        value = jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    return value.block_until_ready()  # the host copy is free to go before the next leaf is read
