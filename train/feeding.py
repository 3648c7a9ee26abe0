"""From a process' own rows of a batch to global arrays on a mesh."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dflash_jax.errors import InputError
from dflash_jax.sharding import RULES, placement


@dataclass(frozen=True)
class Feed:
    """Batches of `size` rows over a mesh; None is the default device."""

    size: int
    mesh: Mesh | None

    def __post_init__(self) -> None:
        ways = 1 if self.mesh is None else math.prod(self.mesh.shape.get(axis, 1) for axis in RULES["batch"])
        if self.size % ways:
            raise InputError(
                f"the batch is {self.size} and the mesh's {' x '.join(RULES['batch'])} divides it {ways} ways; "
                f"give a multiple of {ways}"
            )

    def _sharding(self, ndim: int, mesh: Mesh) -> NamedSharding:
        return placement(("batch", *(None,) * (ndim - 1)), (self.size, *(1,) * (ndim - 1)), mesh)

    def rows(self) -> np.ndarray:
        """The rows of a batch that this process' devices hold, ascending."""
        if self.mesh is None:
            return np.arange(self.size)
        held = self._sharding(1, self.mesh).addressable_devices_indices_map((self.size,)).values()
        return np.unique(np.concatenate([np.arange(self.size)[index] for index in held]))

    def own(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Of a whole batch, this process' rows."""
        rows = self.rows()
        return {name: x[rows] for name, x in batch.items()}

    def put(self, own: Mapping[str, np.ndarray], step: int) -> dict[str, Any]:
        """Global arrays [size, ...] of what each process holds, and `step`, uint32 [], beside them."""
        batch = {**own, "step": np.uint32(step)}
        mesh = self.mesh
        if mesh is None:
            return jax.device_put(batch)
        place = np.full(self.size, -1)
        place[self.rows()] = np.arange(len(self.rows()))

        def spread(x: Any) -> jax.Array:
            if np.ndim(x) == 0:
                return jax.make_array_from_callback((), NamedSharding(mesh, PartitionSpec()), lambda _: np.asarray(x))
            shape = (self.size, *x.shape[1:])
            return jax.make_array_from_callback(
                shape, self._sharding(x.ndim, mesh), lambda index: x[place[np.arange(self.size)[index[0]]]]
            )

        return {name: spread(x) for name, x in batch.items()}
