"""States on a mesh."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import jax
import optax
from jax.sharding import Mesh

from dflash_jax.sharding import state_shardings
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
