"""The layout over a mesh: logical names of array axes, and the one table that maps them to mesh axes.

Models name the axes of their parameters (metadata `axes` of each `nnx.Param`), caches and activations; nothing else
knows the mesh. It is the one of the context (`jax.set_mesh`); without one, everything here leaves arrays as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dflash_jax.errors import InputError

AnyMesh = Mesh | AbstractMesh
MESH_AXES = ("data", "fsdp", "expert", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),  # the model width, of weights only
    "rank": ("fsdp",),  # the width of the selector's tables
    "heads": ("tensor",),
    "kv_heads": ("tensor",),  # copied where there are fewer of them than the axis is long
    "key_heads": ("tensor",),  # of recurrent layers, with their value heads
    "mlp": ("tensor",),
    "experts": ("expert",),
    # Read whole by every round, so spread over all that does not hold the batch.
    "vocab": ("expert", "tensor"),
    "taps": ("expert", "tensor"),
}

Axis = str | tuple[str, int] | None  # a logical name, with the number of heads where the axis is heads x head size
Axes = tuple[Axis, ...]


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh of the axes data, fsdp, expert and tensor, of the given sizes; those left out have size 1.

    InputError for another axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    for name, size in sizes.items():
        if name not in MESH_AXES:
            raise InputError(f"a mesh has no axis {name}; its axes are {', '.join(MESH_AXES)}")
        if size < 1:
            raise InputError(f"the mesh axis {name} has size {size}; give at least 1")
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    if math.prod(shape) != len(devices):
        given = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"a mesh of {given or 'one device'} has {math.prod(shape)} devices and there are {len(devices)}; "
            "give sizes with that product"
        )
    return _auto(np.asarray(devices).reshape(shape), MESH_AXES)


def abstract_mesh(**sizes: int) -> AbstractMesh:
    """A mesh without devices: enough to compute with, and it needs no compiler."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(text: str) -> dict[str, int]:
    """`expert=4,tensor=2` as a person writes it, for `make_mesh`. InputError for anything else."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or not size.isdecimal() or name in sizes:
            raise InputError(f"the mesh is {text!r}; give sizes of {', '.join(MESH_AXES)}, as in expert=4,tensor=2")
        sizes[name] = int(size)
    return sizes


def check_mesh(mesh: Any) -> Mesh:
    """The mesh with axes that the compiler partitions; InputError for axes that are not in the rules."""
    if not isinstance(mesh, Mesh):
        raise InputError(f"the mesh is a {type(mesh).__name__}; give a jax Mesh, such as make_mesh(expert=4, tensor=2)")
    if strange := [name for name in mesh.axis_names if name not in MESH_AXES]:
        raise InputError(f"the mesh has an axis {strange[0]}; its axes can be {', '.join(MESH_AXES)}")
    return _auto(mesh.devices, mesh.axis_names)


def _auto(devices: np.ndarray, names: Sequence[str]) -> Mesh:
    """A mesh whose axes the compiler partitions; newer versions of jax make other ones by default."""
    return Mesh(devices, tuple(names), axis_types=(AxisType.Auto,) * len(names))


def _spread(name: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(axis for axis in RULES[name] if sizes.get(axis, 1) > 1)


def spec(axes: Sequence[Axis], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Where the axes of an array go on a mesh with axes of these sizes.

    InputError for a size that the mesh does not divide, or two axes of the array on one axis of the mesh.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} axes named, {axes}, for an array of shape {tuple(shape)}")
    placed, used = [], set()
    for axis, length in zip(axes, shape, strict=True):
        name, count = axis if isinstance(axis, tuple) else (axis, length)
        on = () if name is None else _spread(name, sizes)
        ways = math.prod(sizes[a] for a in on)
        if name == "kv_heads" and ways > count and ways % count == 0:
            on, ways = (), 1
        if count % ways:
            over = " x ".join(f"{a} {sizes[a]}" for a in on)
            raise InputError(f"the mesh's {over} does not divide {name}, which is {count}; give a mesh that does")
        if used & set(on):
            raise InputError(f"the axes {axes} put two axes of one array on the mesh's {', '.join(used & set(on))}")
        used |= set(on)
        placed.append(on if len(on) > 1 else on[0] if on else None)
    return PartitionSpec(*placed)


def check_layout(model: nnx.Module, mesh: AnyMesh) -> None:
    """InputError for a mesh that does not divide the parameters of a model, which may be shapes alone."""
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        shape = variable.get_value().shape
        spec(param_axes(variable, shape), shape, mesh.shape)


def placement(axes: Sequence[Axis], shape: Sequence[int], mesh: AnyMesh) -> NamedSharding:
    """`spec` on a mesh; for plans it may be one without devices."""
    return NamedSharding(mesh, spec(axes, shape, dict(mesh.shape)))


def param_axes(variable: Any, shape: Sequence[int]) -> Axes:
    """The logical axes that a parameter's module named; none are named for what every device holds whole."""
    return variable.get_metadata().get("axes") or (None,) * len(shape)


def state_shardings(state: Any, mesh: AnyMesh) -> Any:
    """The sharding of every array of a (possibly abstract) state, in its tree.

    Optimisers keep moments in trees of parameters like the ones they are of: these go where their parameters go.
    What is of no parameter, as a count of steps, every device holds.
    """
    return _each_array(lambda x, axes: placement(axes, x.shape, mesh), state)


def constrain_state(state: Any) -> Any:
    """A state or gradients laid out as `state_shardings` says on the context's mesh; as they are without one."""
    return _each_array(lambda x, axes: constrain(x, *axes), state) if _sizes() else state


def _each_array(function: Callable[[Any, Axes], Any], state: Any) -> Any:
    def of(x: Any) -> Any:
        if not isinstance(x, nnx.Variable):
            return function(x, (None,) * x.ndim)
        value = x.get_value()  # of a parameter that an optimiser leaves out, a node without arrays
        return x.replace(function(value, param_axes(x, value.shape))) if hasattr(value, "shape") else x

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _sizes() -> dict[str, int]:
    """Axis sizes of the context's mesh; none without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)


def shards(name: str) -> int:
    """Over how many devices of the context's mesh a logical axis is spread."""
    sizes = _sizes()
    return math.prod(sizes.get(axis, 1) for axis in RULES[name])


def with_copies(rows: jax.Array) -> jax.Array:
    """Rows [B, W, K, H] of keys or values with `kv_copies` of each head, as a cache holds them."""
    copies = kv_copies(rows.shape[2])
    return rows if copies == 1 else jnp.repeat(rows, copies, axis=2)


def kv_copies(heads: int) -> int:
    """How many copies of each KV head a cache holds, so that each shard of the query heads has its own."""
    ways = shards("kv_heads")
    return ways // heads if ways > heads and ways % heads == 0 else 1


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """x laid out by its logical axes; "..." stands for any number of axes that are whole."""
    sizes = _sizes()
    if not sizes:
        return x
    if "..." in axes:
        at = axes.index("...")
        axes = (*axes[:at], *(None,) * (x.ndim - len(axes) + 1), *axes[at + 1 :])
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, sizes))


def per_shard(function: Callable[..., Any], inputs: Sequence[Axes], outputs: Any) -> Callable[..., Any]:
    """`function` run on every device's own part (`jax.shard_map`): what kernels need.

    `inputs` names the axes of each argument, `outputs` those of each result, a tuple of `Axes` or one; trailing axes
    that are whole can be left out. Arguments and results may be pytrees of arrays with the same leading axes, or None.
    Inside, `position` and `total` know the shard.
    """
    sizes = _sizes()
    if math.prod(sizes.values()) == 1:
        return function

    def call(*arguments: Any) -> Any:
        def of(axes: Axes, argument: Any) -> Any:
            return jax.tree.map(lambda x: spec((*axes, *(None,) * (x.ndim - len(axes))), x.shape, sizes), argument)

        whole = [of(axes, argument) for axes, argument in zip(inputs, arguments, strict=True)]
        out = [_names(axes, sizes) for axes in (outputs if isinstance(outputs[0], tuple) else (outputs,))]
        specs = tuple(out) if isinstance(outputs[0], tuple) else out[0]
        return jax.shard_map(function, in_specs=tuple(whole), out_specs=specs, check_vma=False)(*arguments)

    return call


def _names(axes: tuple[str | None, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """`spec` of an array whose shape is not known yet, that of a shard's result."""
    on = [() if name is None else _spread(name, sizes) for name in axes]
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in on))


def mesh_axes(name: str) -> tuple[str, ...]:
    """The axes of the context's mesh that a logical axis is spread over, none where it is whole."""
    return _spread(name, _sizes())


def position(name: str) -> jax.Array | int:
    """Inside `per_shard`: which shard of a logical axis this device has."""
    on = mesh_axes(name)
    return jax.lax.axis_index(on) if on else 0


def total(x: jax.Array, *names: str) -> jax.Array:
    """Inside `per_shard`: the sum of all shards of logical axes."""
    on = tuple(dict.fromkeys(axis for name in names for axis in mesh_axes(name)))
    return jax.lax.psum(x, on) if on else x
