"""Models without numbers: what loads, places and plans them starts from their shapes."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

T = TypeVar("T")


class OneKey:
    """In place of `nnx.Rngs`, whose counting makes tracing slower the more there is: 13 s for 60 layers, and not 2."""

    def params(self) -> jax.Array:
        """The same key for every parameter."""
        return jax.random.key(0)


def shapes_of(build: Callable[[Any], T]) -> T:
    """What `build(rngs)` makes, with jax.ShapeDtypeStruct in place of arrays; nothing is allocated."""
    return nnx.eval_shape(lambda: build(OneKey()))
