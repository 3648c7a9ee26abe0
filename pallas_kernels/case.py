"""A kernel at one size of a real model: what `make aot` compiles and puts into docs/kernels.md."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from pallas_kernels.dispatch import Implementation


@dataclass(frozen=True)
class Case:
    """One call of a public function, with shapes in place of arrays; sizes are those of one device."""

    name: str  # model, shard, batch, context, rows
    function: Callable[..., Any]  # (*arrays, implementation=...)
    arguments: tuple[Any, ...]  # pytrees of jax.ShapeDtypeStruct
    must_move: int  # bytes that any implementation reads or writes
    moved: int  # bytes that the TPU kernel reads and writes, as in its cost estimate
    flops: int
    whole: tuple[Any, ...] = ()  # values of the arguments that are int32, in order: what is an index is no noise

    def call(self, implementation: Implementation | None) -> Callable[..., Any]:
        """The function with the implementation bound, for `jax.jit`."""
        return lambda *arrays: self.function(*arrays, implementation=implementation)

    def shapes(self, sharding: jax.sharding.Sharding) -> tuple[Any, ...]:
        """The arguments placed on a device."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self.arguments)
