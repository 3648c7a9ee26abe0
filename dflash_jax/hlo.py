"""What a compiled program says of itself, read from its HLO text: collectives, large temporaries, estimated cycles."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

WIDTHS = {"pred": 1, "token": 0, "opaque": 0}  # bytes of a dtype whose name does not end in its bits
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
# They name, place or change the type of what another instruction made.
LAYOUT = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape", "slice", "transpose")
NO_BUFFER = (
    "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "parameter", "partition-id",
    "tuple", "while",
)  # fmt: skip

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)(?= [a-z][\w\-]*\()|\S+) ([a-z][\w\-]*)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclass(frozen=True)
class Shape:
    """One array. `space` is the memory it is in: 0 is HBM, 1 is VMEM on a TPU."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        bits = re.search(r"(\d+)", self.dtype)
        width = WIDTHS.get(self.dtype, int(bits.group(1)) / 8 if bits else 0)
        return math.ceil(math.prod(self.dims) * width)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    shapes: tuple[Shape, ...]  # of the results; more than one for a tuple
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def op_name(self) -> str:
        """Where it comes from in the source: scopes and primitive, or the argument that a parameter is."""
        return (self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or "").replace("\\'", "'")

    @property
    def cycles(self) -> int:
        """As the TPU compiler estimates; 0 where it does not say."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)


@dataclass(frozen=True)
class Collective:
    """An exchange between devices. `bytes` is the size of the whole result (of the input, for a reduce-scatter)."""

    kind: str
    shape: str
    bytes: int
    devices: int  # that take part with one another
    source: str  # scopes
    of_weight: str | None  # the parameter whose shards it puts together

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a ring."""
        share = (self.devices - 1) / self.devices
        return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share) * self.bytes


@dataclass(frozen=True)
class Temporary:
    """A result that is written to memory."""

    shape: Shape
    op: str
    source: str
    of_weight: str | None = None  # the parameter that it is a copy of


class Program:
    """The computations of an HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        body: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                body = self.computations[header.group(2)] = {}
                self.entry = header.group(2) if header.group(1) else self.entry
            elif (found := _INSTRUCTION.match(line)) is not None:
                instruction = _instruction(*found.groups())
                body[instruction.name] = instruction
        self.callers: dict[str, tuple[str, Instruction]] = {}
        self._inner: set[str] = set()  # computations without buffers of their own
        for name, computation in self.computations.items():
            for instruction in computation.values():
                self._call(name, instruction)

    def _call(self, computation: str, instruction: Instruction) -> None:
        for kind, called in re.findall(r"(calls|to_apply|body|condition)=%?([\w.\-]+)", instruction.attributes):
            self.callers[called] = (computation, instruction)
            if instruction.op == "fusion" or (kind in ("to_apply", "condition") and instruction.op != "call"):
                self._inner.add(called)

    def parameters(self) -> list[Instruction]:
        """The program's arguments."""
        return [i for i in self.computations.get(self.entry, {}).values() if i.op == "parameter"]

    def scheduled(self) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) of all that run by themselves: a loop's body once, the inside of fusions not."""
        for name, computation in self.computations.items():
            if name not in self._inner:
                yield from ((name, instruction) for instruction in computation.values())

    def collectives(self) -> list[Collective]:
        """Every collective once, asynchronous and fused ones too; those of a loop's body once."""
        found = []
        for name, computation in self.computations.items():
            for i in computation.values():
                kind = i.op.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                results = _results(i)
                size, devices = sum(shape.bytes for shape in results), _group_size(i.attributes)
                size *= devices if kind == "reduce-scatter" else 1
                weight = self._weight(name, i) if kind == "all-gather" else None
                shape = " ".join(map(str, results))
                found.append(Collective(kind, shape, size, devices, self._source(name, i), weight))
        return found

    def _source(self, computation: str, instruction: Instruction) -> str:
        """Scopes of an instruction, or of the call that it is the body of."""
        while not instruction.op_name and computation in self.callers:
            computation, instruction = self.callers[computation]
        return instruction.op_name

    def _weight(self, computation: str, instruction: Instruction) -> str | None:
        """The weight that an instruction's first operand is, if nothing was computed from it on the way."""
        name = instruction.operands[0] if instruction.operands else ""
        for _ in range(64):
            found = self.computations[computation].get(name)
            if found is None:
                return None
            if found.op == "parameter":
                if computation == self.entry:
                    return found.op_name if found.op_name.startswith("weights") else None
                computation, caller = self.callers.get(computation, ("", found))
                index = int(found.attributes.partition(")")[0])
                if not computation or index >= len(caller.operands):
                    return None
                name = caller.operands[index]
            elif found.op == "get-tuple-element" or found.op in LAYOUT or self._only_layout(found):
                name = found.operands[0]
            else:
                return None
        return None

    def _only_layout(self, instruction: Instruction) -> bool:
        called = instruction.attribute(r"calls=%?([\w.\-]+)")
        if instruction.op != "fusion" or called is None or len(instruction.operands) != 1:
            return False
        return all(i.op in (*LAYOUT, "parameter") for i in self.computations[called].values())

    def temporaries(self) -> list[Temporary]:
        """Results that are written to memory, the largest first."""
        found = []
        for name, i in self.scheduled():
            if i.op in NO_BUFFER or i.op.endswith(("-done", "-start", "-update")):
                continue
            copied = i.op in LAYOUT or self._only_layout(i)
            weight = self._weight(name, i) if copied else None
            found += [Temporary(shape, i.op, i.op_name, weight) for shape in i.shapes]
        return sorted(found, key=lambda t: -t.shape.bytes)


def _instruction(name: str, types: str, op: str, rest: str) -> Instruction:
    inside, attributes = _split_call(rest)
    operands = () if op in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, op, tuple(_shapes(types)), operands, rest if op == "parameter" else attributes)


def _split_call(rest: str) -> tuple[str, str]:
    """What stands inside the parentheses that are open at the start, and what follows them."""
    depth = 1
    for at, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:at], rest[at + 1 :]
    return rest, ""


def _shapes(types: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(types):
        space = re.search(r"S\((\d+)\)", layout)
        yield Shape(dtype, tuple(int(d) for d in dims.split(",") if d), int(space.group(1)) if space else 0)


def _results(instruction: Instruction) -> tuple[Shape, ...]:
    """The arrays that a collective gives; the start of an asynchronous one also repeats its operands."""
    if instruction.op in ("all-gather-start", "collective-permute-start"):
        count = len(instruction.operands)
        return instruction.shapes[count : 2 * count]
    return instruction.shapes


def _group_size(attributes: str) -> int:
    """Devices that exchange with one another."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found.group(2))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return found.group(1).count(",") + 1
    return 2 if "source_target_pairs" in attributes else 1
