"""The project's programs over models that are only shapes: what `dflash plan` compiles, from configurations alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from dflash_jax.cache import DrafterCache, KeyValues, Recurrence, TargetCache
from dflash_jax.config import DrafterConfig, TargetConfig, load_config, read_json
from dflash_jax.decoding.prefill import CHUNK, capacity, prefill
from dflash_jax.decoding.round import DecodeState, decode_round
from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of
from dflash_jax.models.target import Target
from dflash_jax.sharding import RULES, AnyMesh, Axis, placement, state_shardings

ProgramKind = Literal["round", "plain", "prefill", "train"]
DTYPE = jnp.bfloat16
STOPS = 8  # end tokens that a request may have


@dataclass(frozen=True)
class Leaf:
    """A parameter or a part of a cache, and the part of it that one device holds."""

    path: str  # target/layers/0/mixer/q_proj/kernel, or target/0/keys for the cache of layer 0
    shape: tuple[int, ...]
    local: tuple[int, ...]
    dtype: Any

    @property
    def elements(self) -> int:
        """Of one device."""
        return math.prod(self.local)

    @property
    def bytes(self) -> int:
        """Of one device."""
        return self.elements * jnp.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Abstract:
    """A program ready to be compiled, and what it is given."""

    kind: ProgramKind
    rows: int  # a sequence, that the target runs in one step
    batch: int
    context: int
    mesh: AnyMesh
    weights: tuple[Leaf, ...]
    cache: tuple[Leaf, ...]
    lower: Callable[[], Any]  # to a jax.stages.Lowered


def read_config(path: str | Path) -> dict[str, Any]:
    """A config.json, or that of a checkpoint folder. InputError if there is none."""
    path = Path(path)
    return read_json(path) if path.is_file() else load_config(path)


def build(
    target: TargetConfig, drafter: DrafterConfig | None, mesh: AnyMesh, kind: ProgramKind, batch: int, context: int,
    width: int,
) -> Abstract:  # fmt: skip
    """The program over a mesh whose devices may be compile-only ones, or none; nothing is allocated.

    `round` is one `decode_round` with `width` rows; `plain` the same with one row and no drafter; `prefill` runs
    prompts of `context` tokens. InputError for a mesh that does not divide the models.
    """
    drafter = None if kind == "plain" else drafter
    width = 1 if kind == "plain" else width
    sizes = {axis: mesh.shape[axis] for axis in RULES["batch"]}
    if batch % (ways := mesh.shape["data"] * mesh.shape["fsdp"]):
        over = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        raise InputError(f"the mesh's {over} does not divide the batch, which is {batch}; give a multiple of {ways}")
    models = shapes_of(lambda rngs: _models(target, drafter, rngs))
    graph, weights = nnx.split(models)
    weights = _placed(weights, state_shardings(weights, mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.eval_shape(lambda: empty_state(target, drafter, batch, context, width))
    shardings = decode_state_shardings(state, mesh)
    state = _placed(state, shardings)

    def one_round(weights: nnx.State, state: DecodeState) -> DecodeState:
        return decode_round(*nnx.merge(graph, weights), state, None, width)

    def lower() -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            if kind == "prefill":
                per_request = (state.tokens, state.known, state.limit, state.stops)
                return prefill.lower(graph, weights, *per_request, None, width, CHUNK)
            return jax.jit(one_round, donate_argnums=1, out_shardings=shardings).lower(weights, state)

    leaves = tuple(_leaves(weights, ("target", "drafter")))
    drafted = () if state.draft_cache is None else state.draft_cache.layers
    caches = tuple(_leaves((state.cache.layers, drafted), ("target", "drafter")))
    rows = CHUNK if kind == "prefill" else width
    return Abstract(kind, rows, batch, context, mesh, leaves, caches, lower)


def _models(target: TargetConfig, drafter: DrafterConfig | None, rngs: Any) -> tuple[Target, Drafter | None]:
    made = None if drafter is None else Drafter(drafter, dtype=DTYPE, rngs=rngs)
    return Target(target, dtype=DTYPE, rngs=rngs), made


def empty_state(
    target: TargetConfig, drafter: DrafterConfig | None, batch: int, context: int, width: int
) -> DecodeState:
    """The state of `batch` greedy requests that have room for `context` tokens."""
    room = capacity(context)
    numbers = jnp.zeros(batch, jnp.int32)
    return DecodeState(
        cache=TargetCache.empty(target, batch, room, width, DTYPE),
        draft_cache=None if drafter is None else DrafterCache.empty(drafter, batch, room, DTYPE),
        tokens=jnp.zeros((batch, room), jnp.int32),
        start=numbers,
        known=numbers,
        limit=numbers,
        stops=jnp.zeros((batch, STOPS), jnp.int32),
        finished=jnp.zeros(batch, bool),
        counts=jnp.zeros((batch, room), jnp.int32),
        rounds=numbers,
        history=None,
    )


def decode_state_shardings(state: DecodeState, mesh: Any) -> DecodeState:
    """Where every part of a decode state goes: sequences on the batch's axes, heads on theirs."""

    def place(x: Any, *axes: Axis) -> Any:
        return placement((*axes, *(None,) * (x.ndim - len(axes))), x.shape, mesh)

    def layer(cache: KeyValues | Recurrence) -> Any:
        if isinstance(cache, KeyValues):
            return jax.tree.map(lambda x: place(x, "batch", "kv_heads"), cache)
        state, pending = jax.tree.map(lambda x: place(x, "batch", "key_heads"), (cache.state, cache.pending))
        return Recurrence(state, place(cache.conv, "batch", None, "key_heads"), pending)

    def is_layer(x: Any) -> bool:
        return isinstance(x, KeyValues | Recurrence)

    return jax.tree.map(lambda x: layer(x) if is_layer(x) else place(x, "batch"), state, is_leaf=is_layer)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _leaves(tree: Any, names: tuple[str, ...]) -> Any:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        keys = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path]
        keys = [k for k in keys if k != "value"]
        yield Leaf("/".join((names[int(keys[0])], *keys[1:])), x.shape, x.sharding.shard_shape(x.shape), x.dtype)
