"""The least time that a step takes on a device, part by part: the bytes it has to move and the products it has to do.

Counted from the configurations and from what each device holds: weights once (of the experts those that are chosen),
keys and values of the visible context, recurrent state read and written once. Rows of activations are not counted, nor
is any latency. Exchanges between devices are counted as rings at full link bandwidth, not overlapped.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from dflash_jax.abstract import Abstract, Leaf
from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.topology import Topology

ITEM = 2  # bytes of an activation


@dataclass
class Part:
    """Work of one device."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0  # bytes to other devices

    def seconds(self, topology: Topology) -> float:
        return (
            max(self.flops / topology.flops, self.bytes / topology.hbm_bandwidth) + self.sent / topology.link_bandwidth
        )


@dataclass(frozen=True)
class Step:
    """What the parts of one step of a program are counted from."""

    target: TargetConfig
    drafter: DrafterConfig | None
    program: Abstract
    rows: int  # a sequence, that the target runs
    parts: dict[str, Part] = field(default_factory=dict)

    def part(self, name: str) -> Part:
        return self.parts.setdefault(name, Part(name))

    @property
    def sequences(self) -> int:
        """On one device."""
        shape = self.program.mesh.shape
        return self.program.batch // (shape["data"] * shape["fsdp"])

    @property
    def prefill(self) -> bool:
        return self.program.kind == "prefill"

    @property
    def steps(self) -> int:
        """In how many steps the program ends; the head runs only in the last of a prefill."""
        return max(1, math.ceil(self.program.context / self.rows)) if self.prefill else 1


def roofline(target: TargetConfig, drafter: DrafterConfig | None, program: Abstract, rows: int) -> list[Part]:
    """The parts of a step in which the target runs `rows` rows a sequence; drafter None: plain decoding."""
    step = Step(target, drafter, program, rows)
    for leaf in program.weights:
        if leaf.path.startswith("target/"):
            _target_weight(step, leaf)
        elif drafter is not None:
            _drafter_weight(step, leaf)
    for leaf in program.cache:
        if leaf.path.startswith("target/"):
            _target_cache(step, leaf)
        elif drafter is not None:
            _drafter_cache(step, leaf)
    _exchanges(step)
    return list(step.parts.values())


def mlp_name(target: TargetConfig) -> str:
    """What the second half of the target's layers is called."""
    return "MLP" if target.moe is None else "experts"


def mixer_name(target: TargetConfig, layer: int) -> str:
    """What the first half of a layer of the target is called."""
    return "recurrent layers" if target.layer_types[layer] == "linear_attention" else "target attention"


def chosen_share(experts: int, top_k: int, rows: int) -> float:
    """The share of experts that some of the rows chose, each row by itself and all experts alike."""
    return 1 - (1 - top_k / experts) ** rows


def _target_weight(step: Step, leaf: Leaf) -> None:
    keys = leaf.path.split("/")
    rows, target = step.sequences * step.rows, step.target
    if keys[1] == "layers":
        layer, where = int(keys[2]), keys[3]
        if where in ("mlp", "post_norm"):
            part = step.part(mlp_name(target))
            if "experts" in keys and target.moe is not None and not target.moe.dense:
                _experts(part, leaf, target.moe.num_experts, target.moe.top_k, rows)
                return
        else:
            part = step.part(mixer_name(target, layer))
        _product(step, part, leaf, rows)
        return
    if keys[1] == "embed":
        step.part("head").bytes += rows * target.hidden_size * ITEM
        if not target.tie_word_embeddings:
            return
    _head(step, leaf)


def _head(step: Step, leaf: Leaf) -> None:
    """The output matrix, and the final norm: once for the target's rows, once for the drafted ones."""
    rows = step.sequences * (1 if step.prefill else step.rows)
    _product(step, step.part("head"), leaf, rows / step.steps, 1 / step.steps)
    if step.drafter is not None and not step.prefill and len(leaf.shape) > 1:
        _product(step, step.part("drafter head"), leaf, step.sequences * (step.rows - 1))


def _drafter_weight(step: Step, leaf: Leaf) -> None:
    keys = leaf.path.split("/")
    rows, part = step.sequences * step.rows, step.part("drafter")
    if keys[1] == "selector":
        if keys[2] == "hidden":
            _product(step, part, leaf, 0 if step.prefill else rows)
        elif not step.prefill and step.drafter is not None:
            part.bytes += rows * step.drafter.selector_top_k * leaf.local[1] * ITEM
    elif keys[1] in ("fc", "hidden_norm"):  # of the context only
        _product(step, part, leaf, rows)
    elif keys[1] == "kv_proj":  # of the context, and of the block
        times = 1 if step.prefill else 2
        _product(step, part, leaf, times * rows, times)
    elif not step.prefill:
        _product(step, part, leaf, rows)


def _product(step: Step, part: Part, leaf: Leaf, rows: float, reads: float = 1) -> None:
    """A weight that `rows` rows are multiplied with, read `reads` times."""
    spread = step.program.mesh.shape["fsdp"] if len(leaf.shape) > 1 else 1  # shards that are put together first
    part.bytes += leaf.bytes * spread * reads
    part.sent += leaf.bytes * (spread - 1) * reads
    if len(leaf.shape) > 1:
        part.flops += 2 * rows * leaf.elements * spread


def _experts(part: Part, leaf: Leaf, experts: int, top_k: int, rows: int) -> None:
    ways = leaf.shape[0] // leaf.local[0]
    part.bytes += leaf.bytes * chosen_share(experts, top_k, rows)
    part.flops += 2 * (rows * top_k / ways) * (leaf.elements / leaf.local[0])


def _target_cache(step: Step, leaf: Leaf) -> None:
    keys = leaf.path.split("/")
    layer, target = int(keys[1]), step.target
    part = step.part(mixer_name(target, layer))
    if target.layer_types[layer] == "linear_attention":
        part.bytes += 2 * leaf.bytes
        if keys[-1] == "state":  # for each row: what it reads, what it asks, what it leaves; and the rows themselves
            batch, heads, k_dim, v_dim = leaf.local
            part.flops += batch * heads * step.rows * (6 * k_dim * v_dim + 2 * step.rows * (k_dim + v_dim))
        return
    window = target.sliding_window if target.layer_types[layer] == "sliding_attention" else None
    _attention(step, part, leaf, target.num_heads, window)


def _drafter_cache(step: Step, leaf: Leaf) -> None:
    drafter, part = step.drafter, step.part("drafter")
    if drafter is None:
        return
    sliding = drafter.layer_types[int(leaf.path.split("/")[1])] == "sliding_attention"
    window = drafter.sliding_window if sliding else None
    if step.prefill:
        batch, heads, _, size = leaf.local
        part.bytes += batch * heads * step.rows * size * ITEM
        return
    _attention(step, part, leaf, drafter.num_heads, window)


def _attention(step: Step, part: Part, leaf: Leaf, heads: int, window: int | None) -> None:
    """The keys or the values of one layer: the visible ones are read, the rows' own are written."""
    batch, kv_heads, _, size = leaf.local
    # On the average over the chunks of a prefill half of the context is there.
    context = step.program.context / 2 if step.prefill else step.program.context
    seen = context if window is None else min(context, window + step.rows)
    part.bytes += batch * kv_heads * size * ITEM * (seen + step.rows)
    own = heads // step.program.mesh.shape["tensor"]
    part.flops += 2 * batch * own * step.rows * size * seen


def _exchanges(step: Step) -> None:
    """Sums over the devices that share a row: behind both halves of a layer, the lookup, and the drafter's fusion."""
    shape = step.program.mesh.shape
    tensor, everything = shape["tensor"], shape["tensor"] * shape["expert"]
    row = step.target.hidden_size * ITEM
    rows = step.sequences * step.rows

    def total(part: str, devices: int, rows: float) -> None:
        step.part(part).sent += 2 * (devices - 1) / devices * rows * row

    for layer in range(step.target.num_layers):
        total(mixer_name(step.target, layer), tensor, rows)
        sparse = step.target.is_sparse(layer)
        total(mlp_name(step.target), everything if sparse else tensor, rows)
    total("head", everything, rows)
    if step.drafter is not None:
        total("drafter", everything, rows)  # the fusion of the taps
        if not step.prefill:
            total("drafter", everything, rows)  # the block's embeddings
            total("drafter", tensor, 2 * step.drafter.num_layers * rows)


def seconds(parts: Iterable[Part], topology: Topology) -> float:
    """Of a step, its parts one after the other."""
    return sum(part.seconds(topology) for part in parts)
