"""`dflash plan`: compile a program for accelerators that are not here; what it will need, and how fast it can be.

Compiled: the project's own program, sharded over the mesh, by the compiler that would run it; its memory, flops, bytes,
collectives and temporaries are the compiler's. Computed: the roofline of `dflash_jax.roofline`. Nothing is measured.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dflash_jax.abstract import Abstract, build, read_config
from dflash_jax.checkpoints import load_drafter_config
from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.errors import InputError
from dflash_jax.hlo import Program, Temporary
from dflash_jax.pair import check_fit
from dflash_jax.roofline import Part, mixer_name, mlp_name, roofline, seconds
from dflash_jax.sharding import RULES, abstract_mesh, make_mesh, mesh_sizes
from dflash_jax.topology import Topology, parse_topology

KINDS = ("round", "plain", "prefill", "train")
SHOWN = 20  # shapes of temporaries in the result


@dataclass(frozen=True)
class Request:
    """What is to be planned."""

    target: str | Path
    drafter: str | Path | DrafterConfig | None
    topology: str
    mesh: str = ""
    program: str = "round"
    batch: int = 1
    context: int = 32768
    width: int | None = None
    acceptance_length: float = 4.0
    compile: bool = True


Trained = Callable[[TargetConfig, DrafterConfig, Any, int, int], tuple[Abstract, list[Part]]]
"""(target, drafter, mesh, batch, context) -> a training step and its roofline: `train.plan.planned`."""


def plan(request: Request, trained: Trained | None = None) -> dict[str, Any]:
    """All that is known of a program, as a JSON object (keys: README, "Planning").

    `trained` makes the program "train"; the library knows no training, so whoever asks for it brings it.

    InputError for a configuration, topology or mesh that cannot be.
    """
    topology = parse_topology(request.topology)
    _check(request)
    if request.program == "train" and trained is None:
        raise InputError("the program train is that of the trainers; give plan(request, train.plan.planned)")
    target = TargetConfig.from_dict(read_config(request.target))
    if target.max_position and request.context > target.max_position:
        raise InputError(
            f"the context is {request.context} tokens, and the target takes {target.max_position} positions; "
            f"give at most {target.max_position}"
        )
    drafter = request.drafter
    if isinstance(drafter, str | Path):
        folder = Path(drafter)
        drafter = load_drafter_config(folder) if folder.is_dir() else DrafterConfig.from_dict(read_config(folder))
    if drafter is not None:
        check_fit(target, drafter)
    width = _width(request, drafter)
    sizes = mesh_sizes(request.mesh) or {"tensor": topology.num_devices}
    make_mesh(range(topology.num_devices), **sizes)  # refuses what cannot be, before the compiler is looked for
    mesh = make_mesh(topology.devices(), **sizes) if request.compile else abstract_mesh(**sizes)
    used = None if request.program == "plain" else drafter
    kind: Any = request.program
    if trained is not None and drafter is not None and kind == "train":
        program, parts = trained(target, drafter, mesh, request.batch, request.context)
    else:
        program = build(target, used, mesh, kind, request.batch, request.context, width)
        parts = roofline(target, used, program, program.rows)
    whole = seconds(parts, topology)
    result: dict[str, Any] = {
        "target": str(request.target),
        "drafter": str(request.drafter) if isinstance(request.drafter, str | Path) else None,
        "topology": str(topology),
        "devices": topology.num_devices,
        "peaks": _peaks(topology),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "program": request.program,
        "batch": request.batch,
        "context": request.context,
        "rows": program.rows,
        "memory": _memory(program, topology),
        "roofline": _roofline(parts, topology, whole),
    }
    if request.program == "round":
        result["speedup"] = _speedup(target, program, topology, whole, request.acceptance_length)
    if not request.compile:
        result["compiled"] = None
    elif result["memory"]["arguments"] > topology.hbm_bytes:
        result["compiled"] = None  # the compiler would say no more than that
    else:
        result["compiled"] = _compiled(program, target, used, topology, result)
    return result


def _check(request: Request) -> None:
    if request.program not in KINDS:
        raise InputError(f"the program is {request.program!r}; it can be {', '.join(KINDS)}")
    if request.batch < 1:
        raise InputError(f"the batch is {request.batch}; give at least 1")
    if request.context < 2:
        raise InputError(f"the context is {request.context}; give at least 2 tokens")
    if not request.acceptance_length >= 1:
        raise InputError(f"the acceptance length is {request.acceptance_length}; a round gives at least 1 token")
    if request.program in ("round", "train") and request.drafter is None:
        what = "a round" if request.program == "round" else "a training step"
        raise InputError(f"{what} needs a drafter; give --drafter, or --program plain")


def _width(request: Request, drafter: DrafterConfig | None) -> int:
    block = 1 if drafter is None else drafter.block_size
    width = block if request.width is None else request.width
    if not 1 <= width <= block:
        raise InputError(f"the width is {width}; give a whole number from 1 to {block}, the drafter's block size")
    if request.program == "round" and request.acceptance_length > width:
        raise InputError(
            f"the acceptance length is {request.acceptance_length} and a round has {width} rows; give less"
        )
    return width


def _peaks(topology: Topology) -> dict[str, Any]:
    return {
        "flops": topology.flops,
        "hbm_bytes": topology.hbm_bytes,
        "hbm_bandwidth": topology.hbm_bandwidth,
        "link_bandwidth": topology.link_bandwidth,
        "source": topology.chip.source,
    }


def _memory(program: Abstract, topology: Topology) -> dict[str, Any]:
    """Bytes a device of what the program is given; the compiler adds its temporaries."""
    weights, cache = (sum(leaf.bytes for leaf in leaves) for leaves in (program.weights, program.cache))
    found = {"weights": weights, "cache": cache, "arguments": weights + cache, "total": weights + cache}
    return found | {"hbm": topology.hbm_bytes, "fits": found["total"] <= topology.hbm_bytes}


def _roofline(parts: list[Part], topology: Topology, whole: float) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        asdict(p) | {"seconds": p.seconds(topology), "share": p.seconds(topology) / whole} for p in parts
    ]
    drafting = sum(row["seconds"] for row in rows if row["name"].startswith("drafter"))
    total = {name: sum(row[name] for row in rows) for name in ("flops", "bytes", "sent")}
    return {"parts": rows, "seconds": whole, "drafter_share": drafting / whole, **total}


def _speedup(
    target: TargetConfig, program: Abstract, topology: Topology, whole: float, acceptance_length: float
) -> dict[str, Any]:
    plain = seconds(roofline(target, None, program, 1), topology)
    return {
        "acceptance_length": acceptance_length,
        "plain_seconds": plain,
        "round_seconds": whole,
        "speedup": acceptance_length * plain / whole,
        "break_even": whole / plain,  # acceptance length from which on a round pays
    }


def _compiled(
    program: Abstract, target: TargetConfig, drafter: DrafterConfig | None, topology: Topology, result: dict[str, Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        result["memory"]["fits"] = False
        return {"out_of_memory": reason(error)}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")}
    sizes["code"] = memory.generated_code_size_in_bytes
    total = sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"] + sizes["code"]
    result["memory"] |= {"temporaries": sizes["temp"], "total": total, "fits": total <= topology.hbm_bytes}
    text = compiled.as_text()
    hlo = Program(text)
    flops, moved = (cost.get(name) for name in ("flops", "bytes accessed"))
    return {
        "seconds_to_compile": time.perf_counter() - start,
        "memory": sizes,
        "flops": flops,
        "bytes_accessed": moved,
        "roofline_seconds": None if not moved else max((flops or 0) / topology.flops, moved / topology.hbm_bandwidth),
        "estimated_cycles": _cycles(hlo, target),
        "collectives": _collectives(hlo),
        "weight_all_gathers": _weight_gathers(hlo),
        "temporaries": _grouped(hlo.temporaries())[:SHOWN],
        "weight_copies": _grouped(t for t in hlo.temporaries() if t.of_weight and t.shape.bytes >= 2**20),
        "vocabulary_temporaries": _grouped(_vocabulary(hlo, program, target)),
        "kernels": dict(Counter(re.findall(r'custom_call_target="(tpu_custom_call|mosaic_gpu_v2)"', text))),
    }


def reason(error: Exception) -> str:
    """What a compiler says went wrong: one line of at most 300 characters, where the first is a heading the second."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    line = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
    return line if len(line) <= 300 else line[:299] + "…"


def _cycles(hlo: Program, target: TargetConfig) -> dict[str, int]:
    """The TPU compiler's estimate for what it scheduled, by part; it has none for kernels and collectives."""
    found: Counter[str] = Counter()
    for _, instruction in hlo.scheduled():
        if instruction.cycles:
            found[part_of(instruction.op_name, target)] += instruction.cycles
    return dict(found.most_common())


def part_of(op_name: str, target: TargetConfig) -> str:
    """The part of a step that an instruction belongs to, by its scopes."""
    if layer := re.search(r"layer(\d+)/(mixer|mlp)", op_name):
        return mixer_name(target, int(layer.group(1))) if layer.group(2) == "mixer" else mlp_name(target)
    if "/propose/" in op_name:
        return "drafter" if re.search(r"/draft\d+/", op_name) else "drafter head"
    return next((name for scope, name in SCOPES.items() if f"/{scope}/" in op_name), "other")


SCOPES = {"verify": "head", "accept": "accept", "commit": "commit"}


def _collectives(hlo: Program) -> list[dict[str, Any]]:
    """By kind, shape and devices, the most bytes first."""
    groups: dict[tuple, dict[str, Any]] = {}
    for c in hlo.collectives():
        key = (c.kind, c.shape, c.devices)
        row = {"kind": c.kind, "shape": c.shape, "devices": c.devices, "bytes": c.bytes, "count": 0, "sent": 0.0}
        group = groups.setdefault(key, row | {"source": _without_numbers(c.source)})
        group["count"] += 1
        group["sent"] += c.sent
    return sorted(groups.values(), key=lambda row: -row["sent"])


def _weight_gathers(hlo: Program) -> list[dict[str, Any]]:
    return [{"weight": c.of_weight, "shape": c.shape, "bytes": c.bytes} for c in hlo.collectives() if c.of_weight]


def _grouped(temporaries: Iterable[Temporary]) -> list[dict[str, Any]]:
    groups: dict[tuple, dict[str, Any]] = {}
    for t in temporaries:
        key = (str(t.shape), t.shape.space, t.op, source := _without_numbers(t.of_weight or t.source))
        row = {"shape": str(t.shape), "bytes": t.shape.bytes, "memory": "VMEM" if t.shape.space == 1 else "HBM"}
        groups.setdefault(key, row | {"op": t.op, "source": source, "count": 0})["count"] += 1
    return sorted(groups.values(), key=lambda row: -row["bytes"])


def _without_numbers(source: str) -> str:
    """Scopes with * for the numbers of layers."""
    return re.sub(r"(?<=layer)\d+|(?<=draft)\d+|(?<=\[)\d+(?=\])", "*", source)


def _vocabulary(hlo: Program, program: Abstract, target: TargetConfig) -> list[Temporary]:
    """Temporaries as large as all rows' logits: the vocabulary, or a device's part of it, for each row drafted."""
    shape = program.mesh.shape
    ways = math.prod(shape[axis] for axis in RULES["vocab"])
    sequences = program.batch // math.prod(shape[axis] for axis in RULES["batch"])
    rows = max(2, sequences * max(1, program.rows - 1))
    vocabulary, cached = {target.vocab_size, target.vocab_size // ways}, {leaf.local for leaf in program.cache}

    def is_logits(dims: tuple[int, ...]) -> bool:
        others = [d for d in dims if d not in vocabulary]
        if dims in cached:  # the context can be as long as a part of the vocabulary
            return False
        return len(others) < len(dims) and target.hidden_size not in dims and math.prod(others) >= rows

    return [t for t in hlo.temporaries() if is_logits(t.shape.dims) and not t.of_weight]
