"""Accelerators by name (`v5p:4x4x4`, `h100:8`): compile-only devices on any machine, and published peaks."""

import importlib.util
import math
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from dflash_jax.errors import InputError

GOOGLE = "Google Cloud, TPU system architecture (pages v5e, v5p, v6e, tpu7x)"
NVIDIA = "NVIDIA {} datasheet, SXM5, dense bf16; 400 Gb/s InfiniBand a GPU between hosts as in DGX {}"


@dataclass(frozen=True)
class Chip:
    """Published peaks of one chip. Links are counted one way: half of the bidirectional figure that vendors print."""

    name: str
    platform: str  # "tpu" or "cuda", as jax has it
    flops: float  # bf16, a second
    hbm_bytes: int
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that a chip can send to its neighbours, all links together
    dimensions: int  # of a topology's shape
    source: str
    devices: int = 1  # that jax sees of one chip
    island: int | None = None  # devices that the links join; beyond it the network does
    network_bandwidth: float = 0.0
    kernels: bool = True  # whether there are kernels for it; else the reference runs


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 197e12, 16 * 2**30, 819e9, 200e9, 2, GOOGLE),
        Chip("v5p", "tpu", 459e12, 95 * 2**30, 2765e9, 600e9, 3, GOOGLE),
        Chip("v6e", "tpu", 918e12, 32 * 2**30, 1638e9, 400e9, 2, GOOGLE),
        # Each of the two chiplets is a device with half of everything.
        Chip("tpu7x", "tpu", 2307e12, 192 * 2**30, 7380e9, 600e9, 3, GOOGLE, devices=2),
        *(
            Chip(name.lower(), "cuda", 989e12, size, speed, 450e9, 1, NVIDIA.format(name, name), 1, 8, 50e9)
            for name, size, speed in (("H100", 80 * 10**9, 3350e9), ("H200", 141 * 10**9, 4800e9))
        ),
        Chip(
            "a100",
            "cuda",
            312e12,
            80 * 10**9,
            2039e9,
            300e9,
            1,
            NVIDIA.replace("400", "200").format("A100", "A100"),
            1,
            8,
            25e9,
            kernels=False,
        ),
    )
}

# As `jax.Device.device_kind` has it.
KINDS = {
    "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
    "TPU7x": "tpu7x", "TPU v7x": "tpu7x", "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100",
}  # fmt: skip


def peak_flops(kind: str) -> float | None:
    """The published peak, bf16 operations a second, of one device of this `device_kind`; None where it is not known."""
    chip = CHIPS.get(KINDS.get(kind, ""))
    return None if chip is None else chip.flops / chip.devices


# What the compiler needs to know of a card (xla's GpuTargetConfigProto): CUDA's properties of the SXM5 ones.
HOPPER = {
    "capability": 9,
    "core": 233472,
    "block": 232448,
    "cores": 132,
    "units": 128,
    "cache": 52428800,
    "clock": 1.98,
}
AMPERE = {"capability": 8, "core": 167936, "block": 166912, "cores": 108, "units": 64, "cache": 41943040, "clock": 1.41}
CARDS: dict[str, dict[str, Any]] = {
    "h100": HOPPER | {"name": "NVIDIA H100 80GB HBM3", "bandwidth": 3352320000000, "size": 84978434048},
    "h200": HOPPER | {"name": "NVIDIA H200", "bandwidth": 4806200000000, "size": 150754820096},
    "a100": AMPERE | {"name": "NVIDIA A100-SXM4-80GB", "bandwidth": 2039000000000, "size": 85100000000},
}
CUDA_TARGET = """
gpu_device_info {
  cuda_compute_capability { major: %(capability)d minor: 0 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: %(core)d shared_memory_per_block_optin: %(block)d
  core_count: %(cores)d fpus_per_core: %(units)d
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: %(bandwidth)d l2_cache_size: %(cache)d clock_rate_ghz: %(clock).2f device_memory_size: %(size)d
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "%(name)s"
"""


@dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are joined. Peaks are those of one device as jax sees it."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.chip.devices

    @property
    def flops(self) -> float:
        return self.chip.flops / self.chip.devices

    @property
    def hbm_bytes(self) -> int:
        return self.chip.hbm_bytes // self.chip.devices

    @property
    def hbm_bandwidth(self) -> float:
        return self.chip.hbm_bandwidth / self.chip.devices

    @property
    def link_bandwidth(self) -> float:
        """Bytes a second that a device sends, through the slowest kind of link that the topology has."""
        chip = self.chip
        inside = chip.island is None or self.num_devices <= chip.island
        return chip.link_bandwidth / chip.devices if inside else chip.network_bandwidth

    def devices(self) -> list[Any]:
        """Compile-only devices. InputError where the compiler is not installed or does not know the shape."""
        prepare()
        require_compiler(self.chip)
        from jax.experimental import topologies

        if self.chip.platform == "tpu":
            options: dict[str, Any] = {"topology_name": str(self)}
        else:
            on_host = math.gcd(self.num_devices, self.chip.island or 1)
            hosts = self.num_devices // on_host
            card = CUDA_TARGET % CARDS[self.chip.name]
            options = {"topology_name": "", "topology": f"{hosts}x1x{on_host}", "target_config": card}
        try:
            return list(topologies.get_topology_desc(platform=self.chip.platform, **options).devices)
        except Exception as error:  # the plug-ins raise what they like
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"topology {self}: the compiler does not take it ({reason}); give another shape"
            ) from error


def parse_topology(text: str) -> Topology:
    """From `chip:shape`, as in v5e:2x2, v5p:4x4x4, tpu7x:2x2x1, h100:8 (devices). InputError says what is wrong."""
    name, _, shape = text.strip().lower().partition(":")
    if name not in CHIPS:
        raise InputError(f"topology {text!r}: unknown chip {name!r}; chips are {', '.join(CHIPS)}")
    chip = CHIPS[name]
    example = {1: "8", 2: "2x2", 3: "2x2x1"}[chip.dimensions]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != chip.dimensions:
        sizes = "number of devices" if chip.dimensions == 1 else f"shape of {chip.dimensions} sizes"
        raise InputError(f"topology {text!r}: {name} needs a {sizes}, as in {name}:{example}")
    topology = Topology(chip, tuple(int(size) for size in shape.split("x")))
    if chip.island and topology.num_devices > chip.island and topology.num_devices % chip.island:
        raise InputError(f"topology {text!r}: more than one host needs a multiple of {chip.island} devices")
    return topology


def prepare() -> None:
    """Set what the TPU compiler reads from the environment, and keep jax off accelerators that this machine may have.

    Has to come before jax looks for its devices; later it changes nothing for jax.
    """
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"
    quiet = {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    # No look for the metadata server of a cloud machine, which waits for minutes where there is none.
    host = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    # Several may compile at once: the lock that libtpu takes is for chips, of which there are none.
    host["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    for name, value in (quiet | host).items():
        os.environ.setdefault(name, value)


def has_compiler(chip: Chip) -> bool:
    """Whether the packages that compile for the chip are installed."""
    needed = ("libtpu",) if chip.platform == "tpu" else ("jax_plugins.xla_cuda13", "absl")
    return all(_installed(module) for module in needed)


def require_compiler(chip: Chip) -> None:
    """InputError if the compiler for the chip is missing."""
    if not has_compiler(chip):
        raise InputError(f"the compiler for {chip.name} is not installed; pip install 'dflash-jax[aot]'")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False
