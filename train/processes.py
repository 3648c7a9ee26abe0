"""One program on several processes: joining them, and which part of the work is whose."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dflash_jax.errors import InputError
from dflash_jax.sharding import make_mesh

AUTOMATIC = "DFLASH_DISTRIBUTED"
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product is the number of devices of all processes.

    Args:
        data: the batch
        fsdp: the batch, and the width of weights, which are gathered layer by layer
        expert: experts and the vocabulary
        tensor: heads, MLP columns and the vocabulary
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        return {name: size for name, size in vars(self).items() if size != 1}


def join_arguments(environment: Mapping[str, str]) -> dict[str, str | int] | None:
    """What `jax.distributed.initialize` is to be called with; None where there is one process.

    Three variables name the coordinator, the number of processes and this one's. Under `srun`, and where
    DFLASH_DISTRIBUTED=1 says so (TPU VMs, GKE), jax finds them itself. InputError where a variable is missing.
    """
    given = [name for name in EXPLICIT if environment.get(name)]
    if given:
        missing = [name for name in EXPLICIT if name not in given]
        numbers = [environment.get(name, "") for name in EXPLICIT[1:]]
        if missing or not all(number.isdecimal() for number in numbers):
            raise InputError(
                f"{given[0]} is set, so the processes are joined by {', '.join(EXPLICIT)}; set all three, "
                "as host:port and whole numbers"
            )
        address, count, index = environment[EXPLICIT[0]], *map(int, numbers)
        return {"coordinator_address": address, "num_processes": count, "process_id": index}
    if environment.get(AUTOMATIC) == "1" or int(environment.get("SLURM_NTASKS", "1")) > 1:
        return {}
    return None


def join() -> None:
    """Joins the processes of this run, once, before jax looks for devices."""
    arguments = join_arguments(os.environ)
    if arguments is not None and not jax.distributed.is_initialized():
        jax.distributed.initialize(**arguments)  # pyrefly: ignore


def build_mesh(config: MeshConfig) -> Mesh | None:
    """Of all devices; None for a single one. InputError where the sizes do not multiply to their number."""
    if jax.device_count() == 1 and not config.sizes:
        return None
    return make_mesh(None, **config.sizes)


def build_own_mesh(config: MeshConfig) -> Mesh | None:
    """As `build_mesh`, or of this process' devices alone where the sizes multiply to their number."""
    own = jax.local_devices()
    if jax.process_count() > 1 and math.prod(vars(config).values()) == len(own):
        return make_mesh(own, **config.sizes) if len(own) > 1 else None
    return build_mesh(config)


@dataclass(frozen=True)
class Share:
    """This process' part of work that is cut into pieces: those with `piece % count == index`."""

    index: int
    count: int
    writes: bool = True

    @classmethod
    def of(cls, mesh: Mesh | None) -> "Share":
        """Every process works alone on its pieces; over a mesh of several processes all work on each, one writes it."""
        here, processes = jax.process_index(), jax.process_count()
        if mesh is not None and any(device.process_index != here for device in mesh.devices.flat):
            return cls(0, 1, here == 0)
        return cls(here, processes)

    def pieces(self, total: int) -> range:
        return range(self.index, total, self.count)


def is_first() -> bool:
    """Whether this process speaks for all: it logs, reports and exports."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes, for instance until files that one writes are there for the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def whole_arrays(tree: Any) -> Any:
    """Arrays that several processes hold parts of, whole on each host; others as they are."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
