"""`make aot`: every kernel at real sizes, compiled for accelerators that are not here; writes docs/kernels.md.

Fails where a kernel does not compile (VMEM or shared memory overflow, among others) or moves more than 1.15 times the
bytes that any implementation has to move.
"""

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dflash_jax.topology import Topology, parse_topology, prepare, require_compiler

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h100:8", "a100:8")
DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
MOST = 1.15  # moved / must_move
PROCESSES = 2


@dataclass(frozen=True)
class Result:
    """One case compiled for one chip."""

    folder: str  # of the kernel
    case: str
    topology: str
    must_move: int
    moved: int
    flops: int
    kernel: bool = False  # the call is a kernel there, not the reference
    failure: str = ""

    @property
    def ratio(self) -> float:
        return self.moved / self.must_move


def main() -> int:
    """Compile, write the document, and report; the exit status is 1 after a failure."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kernel", action="append", help="only this one, and no document; may be repeated")
    arguments.add_argument("--topology", action="append", help="only this one, and no document; may be repeated")
    arguments.add_argument("--keep", action="store_true", help="go on from docs/kernels.json, what was compiled before")
    arguments.add_argument("--sample", action="store_true", help="each case for one chip, in turn; no document")
    given = arguments.parse_args()
    for name in given.topology or TOPOLOGIES:
        require_compiler(parse_topology(name).chip)
    jobs = [(kernel, name) for kernel in given.kernel or kernels() for name in given.topology or TOPOLOGIES]
    start = time.perf_counter()
    whole = not given.kernel and not given.topology and not given.sample
    results = stored() if given.keep else []
    there = {(r.folder, r.topology) for r in results}
    jobs = [job for job in jobs if job not in there]
    with multiprocessing.get_context("spawn").Pool(PROCESSES, maxtasksperchild=1) as pool:
        for (kernel, name), found, seconds in pool.imap_unordered(partial(compile_all, sample=given.sample), jobs):
            own = sum(result.kernel for result in found)
            print(f"{kernel} for {name}: {len(found)} cases, {own} as a kernel, {seconds:.0f} s", flush=True)
            results += found
            if whole:
                write(results)
    print(f"{time.perf_counter() - start:.0f} s in all")
    failed = failures(results)
    print("\n".join(failed) or "all compiled")
    return 1 if failed else 0


def stored() -> list[Result]:
    """What was compiled before."""
    file = DOCUMENT.with_suffix(".json")
    return [Result(**values) for values in json.loads(file.read_text())] if file.is_file() else []


def write(results: list[Result]) -> None:
    """The document, and what it is made of."""
    DOCUMENT.parent.mkdir(exist_ok=True)
    results = sorted(results, key=lambda r: (r.folder, r.topology))  # as they came, two runs would differ
    rows = ",\n".join(json.dumps(asdict(result)) for result in results)
    DOCUMENT.with_suffix(".json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    DOCUMENT.write_text("\n".join(document(results)) + "\n", encoding="utf-8")


def kernels() -> list[str]:
    """Kernel folders with cases."""
    import pallas_kernels

    folders = [m.name for m in pkgutil.iter_modules(pallas_kernels.__path__) if m.ispkg]
    base = Path(pallas_kernels.__path__[0])
    return [name for name in folders if (base / name / "cases.py").is_file()]


def compile_all(job: tuple[str, str], sample: bool = False) -> tuple[tuple[str, str], list[Result], float]:
    """The cases of a kernel for a chip, or its share of them, in a process of its own."""
    prepare()
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    kernel, name = job
    start = time.perf_counter()
    topology = parse_topology(name)
    cases = list(importlib.import_module(f"pallas_kernels.{kernel}.cases").cases())
    device = topology.devices()[0]
    found = [compile_case(kernel, case, topology, device) for case in (share(cases, name) if sample else cases)]
    return job, found, time.perf_counter() - start


def share(cases: list[Any], topology: str) -> list[Any]:
    """What a sample compiles for a chip; all chips together have each case once."""
    return cases[TOPOLOGIES.index(topology) :: len(TOPOLOGIES)]


def compile_case(folder: str, case: Any, topology: Topology, device: Any) -> Result:
    """Compile a case for one device as the platform has it.

    A reference is only lowered, but where there are no kernels at all.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array([device]), ("all",))
    result = Result(folder, case.name, str(topology), case.must_move, case.moved, case.flops)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            shapes = case.shapes(NamedSharding(mesh, PartitionSpec()))
            # Given away as the loop does, or state that is updated in place would be copied first.
            call = jax.jit(case.call(None), donate_argnums=tuple(range(len(shapes))))
            lowered = call.lower(*shapes)
        text = lowered.as_text()
        own = "tpu_custom_call" in text or "mosaic_gpu" in text
        if own or not topology.chip.kernels:
            lowered.compile()
    except Exception as error:  # the compilers raise what they like
        return replace(result, failure=str(error).strip().partition("\n")[0][:300])
    return replace(result, kernel=own)


def failures(results: list[Result]) -> list[str]:
    """What must not be."""
    broken = [f"FAILED {r.case} for {r.topology}: {r.failure}" for r in results if r.failure]
    greedy = {r.case: r for r in results if r.ratio > MOST}
    return broken + [f"FAILED {name}: moves {r.ratio:.2f} times what it must" for name, r in greedy.items()]


def bound(result: Result, topology: Topology) -> float:
    """The least time of a case in microseconds: the bytes it must move or its products, whichever takes longer."""
    return 1e6 * max(result.must_move / topology.hbm_bandwidth, result.flops / topology.flops)


HEAD = """# Kernels at real sizes

Written by `make aot`, which compiles every case below for every chip below on a machine that has none of them, and
fails where one does not compile or moves more than 1.15 times the bytes that it must. Nothing here was run or timed
on an accelerator; gpu.md says what was.

**What compiling proves.** For TPUs the real compilers run to the end (Mosaic and XLA of libtpu): the kernel lowers,
its tiles are legal, and its buffers fit VMEM; not that its results are right (tests compare it with its reference
under `InterpretParams`), nor how fast it is. For the H100, XLA's part and ptxas run to the end, too, and with
`MOSAIC_GPU_DUMP_PTXAS=1` show the registers of a Mosaic GPU kernel and what was spilled; shared memory is *not*
proven here: the kernels count theirs themselves.

**Columns.** `must move`: bytes that any implementation reads or writes (weights, keys, values and state once).
`moved`: what the TPU kernel moves, as in its cost estimate (tests count its transfers), as a multiple of that. `us`:
the least time on a device at published peaks, bytes or products, whichever takes longer (tpu7x: one of a chip's two
devices). `ref`: no kernel takes the case on that chip, so the reference would run, which was only lowered, but for the
A100, where it runs always; a dash: it failed, or was not compiled yet.
"""


def document(results: list[Result]) -> Iterator[str]:
    """The lines of docs/kernels.md."""
    topologies = [parse_topology(name) for name in TOPOLOGIES]
    yield HEAD
    yield "| device | bf16 TFLOP/s | HBM GB/s | source |"
    yield "|---|---|---|---|"
    for t in topologies:
        yield f"| {t.chip.name} | {t.flops / 1e12:.0f} | {t.hbm_bandwidth / 1e9:.0f} | {t.chip.source} |"
    groups: dict[str, dict[str, dict[str, Result]]] = {}
    for r in results:
        groups.setdefault(r.folder, {}).setdefault(r.case, {})[r.topology] = r
    for folder, cases in sorted(groups.items()):
        yield f"\n## {folder}\n"
        yield "| case | must move | moved | GFLOP | " + " | ".join(f"{t.chip.name} us" for t in topologies) + " |"
        yield "|---|" + "---:|" * (3 + len(topologies))
        for case, found in cases.items():
            first = next(iter(found.values()))
            cells = " | ".join(_cell(found.get(str(t)), t) for t in topologies)
            size = f"{first.must_move / 2**20:.1f} MiB"
            yield f"| {case} | {size} | {first.ratio:.2f}x | {first.flops / 1e9:.2f} | {cells} |"


def _cell(result: Result | None, topology: Topology) -> str:
    if result is None or result.failure:
        return "-"
    return f"{bound(result, topology):.1f}" + ("" if result.kernel else " ref")


if __name__ == "__main__":
    sys.exit(main())
