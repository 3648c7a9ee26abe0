"""States and batches on a mesh."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dflash_jax.sharding import placement, state_shardings
from train.step import Pytree, TrainState, init_state


def on_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """The context in which a step is traced and run."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def new_state(build: Callable[[], Pytree], optimizer: optax.GradientTransformation, mesh: Mesh | None) -> TrainState:
    """Step 0 with the parameters that `build` makes; on a mesh every device makes its own part of them."""
    if mesh is None:
        return init_state(build(), optimizer)

    def made() -> TrainState:
        return init_state(build(), optimizer)

    shardings = state_shardings(jax.eval_shape(made), mesh)
    with on_mesh(mesh):
        return jax.jit(made, out_shardings=shardings)()


def put_batch(batch: Pytree, mesh: Mesh | None) -> Pytree:
    """A global batch from the sequences that each process gives, in the order of the processes.

    What has no axis, as the step, is the same in every process.
    """
    if mesh is None:
        return batch

    def place(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        if not x.ndim:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec()), x)
        shape = (x.shape[0] * jax.process_count(), *x.shape[1:])
        where = placement(("batch", *(None,) * (x.ndim - 1)), shape, mesh)
        return jax.make_array_from_process_local_data(where, x, shape)

    return jax.tree.map(place, batch)
