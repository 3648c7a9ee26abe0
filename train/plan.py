"""`--program train` of `dflash plan`: one step of a drafter's training over shapes, and the least time that it takes.

Counted: products, weights once a pass, what the optimiser reads and writes. Not counted: rows of activations, the
orthogonalisation of Muon, latency.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dflash_jax.abstract import Abstract, Leaf
from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of
from dflash_jax.models.target import Target
from dflash_jax.roofline import ITEM, Part, mixer_name, mlp_name
from dflash_jax.sharding import AnyMesh, placement, state_shardings
from train.objective import Objective, drafter_terms
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import check_parts, init_state, make_step

WORDS = 7  # fp32 numbers that AdamW moves for a parameter: reads it, its gradient and two moments, and writes three


@dataclass(frozen=True)
class TrainPlan:
    """What is to be compiled: the step that `train.drafter` runs.

    Args:
        objective: the loss, blocks of a sequence, and what is kept for the backward pass
        optimizer: AdamW or Muon
        parts: micro batches
    """

    objective: Objective = field(
        default_factory=lambda: Objective(anchors=512, loss="dpace", remat=True, compute="bfloat16")
    )
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("muon"))
    parts: int = 1


def build(
    target: TargetConfig, drafter: DrafterConfig, mesh: AnyMesh, batch: int, context: int, config: TrainPlan
) -> Abstract:
    """The step over a mesh whose devices may be compile-only ones, or none; nothing is allocated.

    `batch` packed sequences of `context` tokens, over the whole mesh. The target is bfloat16, the drafter float32. What
    the result calls its cache is the optimiser's state. InputError for a mesh that does not divide models or batch.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    check_parts(batch, config.parts, ways)
    graph, params = nnx.split(shapes_of(lambda rngs: Drafter(drafter, dtype=jnp.float32, rngs=rngs)))
    frozen_graph, frozen = nnx.split(shapes_of(lambda rngs: Target(target, dtype=jnp.bfloat16, rngs=rngs)))
    optimizer = make_optimizer(config.optimizer, 1000)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params)
    state, frozen = (_placed(x, state_shardings(x, mesh)) for x in (state, frozen))
    given = {"tokens": jnp.int32, "segments": jnp.int32, "mask": jnp.bool_}
    rows = placement(("batch", None), (batch, context), mesh)
    arrays = {name: jax.ShapeDtypeStruct((batch, context), dtype, sharding=rows) for name, dtype in given.items()}
    arrays["step"] = jax.ShapeDtypeStruct((), jnp.uint32, sharding=placement((), (), mesh))
    terms = functools.partial(drafter_terms, (graph, frozen_graph), config.objective)

    def lower() -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return make_step(terms, optimizer, parts=config.parts).lower(state, frozen, arrays)

    weights = (*_leaves("target", frozen), *_leaves("drafter", state.params))
    moments = tuple(_leaves("optimizer", state.optimizer))
    rows_of_blocks = config.objective.anchors * drafter.block_size
    return Abstract("train", rows_of_blocks, batch, context, mesh, weights, moments, lower)


def planned(
    target: TargetConfig,
    drafter: DrafterConfig,
    mesh: AnyMesh,
    batch: int,
    context: int,
    config: TrainPlan | None = None,
) -> tuple[Abstract, list[Part]]:
    """The step and its parts, for `dflash_jax.plan.plan`."""
    config = config or TrainPlan()
    program = build(target, drafter, mesh, batch, context, config)
    return program, roofline(target, drafter, program, config)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _leaves(name: str, tree: Any) -> Iterator[Leaf]:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        keys = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path]
        yield Leaf(
            "/".join((name, *(k for k in keys if k != "value"))), x.shape, x.sharding.shard_shape(x.shape), x.dtype
        )


@dataclass(frozen=True)
class Counts:
    """What the parts of a step are counted from, on one device."""

    target: TargetConfig
    drafter: DrafterConfig
    program: Abstract
    config: TrainPlan
    parts: dict[str, Part] = field(default_factory=dict)

    def part(self, name: str) -> Part:
        return self.parts.setdefault(name, Part(name))

    @property
    def tokens(self) -> int:
        shape = self.program.mesh.shape
        return self.program.batch // (shape["data"] * shape["fsdp"]) * self.program.context

    @property
    def rows(self) -> int:
        """Of blocks."""
        return self.tokens // self.program.context * self.program.rows

    @property
    def backward(self) -> int:
        """Backward passes: micro batches make the gradients of DFlash 2's two losses one by one."""
        return 2 if self.config.parts > 1 and self.drafter.selector_rank else 1

    @property
    def passes(self) -> int:
        """Products with each of the drafter's weights: forward, two backward, and forward again."""
        return 1 + self.backward * (2 + self.config.objective.remat)


def roofline(target: TargetConfig, drafter: DrafterConfig, program: Abstract, config: TrainPlan) -> list[Part]:
    """The parts of a step: the frozen target forward, the drafter both ways, the heads, the optimiser."""
    counts = Counts(target, drafter, program, config)
    for leaf in program.weights:
        keys = leaf.path.split("/")
        if keys[0] == "drafter":
            _drafter_weight(counts, keys, leaf)
        elif keys[1] == "layers":
            _target_weight(counts, keys, leaf)
    _attention(counts)
    _head(counts)
    _exchanges(counts)
    return list(counts.parts.values())


def _product(counts: Counts, part: Part, leaf: Leaf, rows: float, passes: int) -> None:
    """Every micro batch gathers and reads the weight anew."""
    spread = counts.program.mesh.shape["fsdp"] if len(leaf.shape) > 1 else 1  # shards that are put together first
    gathered, times = leaf.elements * ITEM * spread, counts.config.parts
    part.bytes += gathered * passes * times
    part.sent += leaf.elements * ITEM * (spread - 1) * min(passes, 2) * times
    if len(leaf.shape) > 1:
        part.flops += 2 * rows * leaf.elements * spread * passes


def _target_weight(counts: Counts, keys: list[str], leaf: Leaf) -> None:
    target = counts.target
    part = counts.part(mlp_name(target) if keys[3] in ("mlp", "post_norm") else mixer_name(target, int(keys[2])))
    rows: float = counts.tokens
    if "experts" in keys and target.moe is not None:
        rows *= target.moe.top_k / target.moe.num_experts  # each weight is one expert's
    _product(counts, part, leaf, rows, 1)


def _drafter_weight(counts: Counts, keys: list[str], leaf: Leaf) -> None:
    part, rows = counts.part("drafter"), counts.rows
    if keys[1] in ("fc", "hidden_norm"):
        rows = counts.tokens
    elif keys[1] == "kv_proj":
        rows = counts.rows + counts.tokens
    if keys[1] != "selector" or keys[2] == "hidden":
        _product(counts, part, leaf, rows, counts.passes)
    optimizer, times = counts.part("optimizer"), counts.config.parts
    optimizer.bytes += (WORDS + (2 * times if times > 1 else 0)) * 4 * leaf.elements  # and to add up gradients
    ways = counts.program.mesh.shape["data"] * (1 if _on_fsdp(leaf) else counts.program.mesh.shape["fsdp"])
    optimizer.sent += 4 * leaf.elements * 2 * (ways - 1) / ways * times  # gradients over the batch's devices
    if _on_fsdp(leaf):
        optimizer.sent += 4 * leaf.elements * (counts.program.mesh.shape["fsdp"] - 1) * times


def _on_fsdp(leaf: Leaf) -> bool:
    return len(leaf.shape) > 1 and leaf.shape != leaf.local


def _attention(counts: Counts) -> None:
    """Two products forward; backward five, of which one makes the scores again."""
    target, drafter, tensor = counts.target, counts.drafter, counts.program.mesh.shape["tensor"]
    context = counts.program.context
    for layer, kind in enumerate(target.layer_types):
        part = counts.part(mixer_name(target, layer))
        if kind == "linear_attention" and target.gated_delta is not None:
            c = target.gated_delta
            part.flops += counts.tokens * c.num_v_heads // tensor * 6 * c.k_head_dim * c.v_head_dim
            continue
        seen = _seen(context, target.sliding_window if kind == "sliding_attention" else None)
        part.flops += 4 * counts.tokens * (target.num_heads // tensor) * target.head_dim * seen
    products = 2 + counts.backward * (5 + 2 * counts.config.objective.remat)
    for kind in drafter.layer_types:
        seen = _seen(context, drafter.sliding_window if kind == "sliding_attention" else None) + drafter.block_size
        flops = 2 * products * counts.rows * (drafter.num_heads // tensor) * drafter.head_dim * seen
        counts.part("drafter").flops += flops


def _seen(context: int, window: int | None) -> float:
    """Positions that a row sees on the average."""
    reach = context if window is None else min(window, context)
    return reach * (1 - reach / (2 * context))


def _head(counts: Counts) -> None:
    """Logits and gradients of the hidden rows: a product each, and a sum over the vocabulary's devices."""
    shape, part = counts.program.mesh.shape, counts.part("drafter head")
    ways = shape["expert"] * shape["tensor"]
    rows = counts.rows * (counts.drafter.block_size - 1) / counts.drafter.block_size
    vocab = counts.config.objective.vocabulary or counts.target.vocab_size
    elements = vocab // ways * counts.target.hidden_size
    part.flops += 2 * (1 + counts.backward) * rows * elements
    part.bytes += (1 + counts.backward) * elements * ITEM * counts.config.parts
    part.sent += 2 * (ways - 1) / ways * rows * counts.target.hidden_size * 4
    part.sent += elements * ITEM * (shape["fsdp"] - 1) / shape["fsdp"] * counts.config.parts


def _exchanges(counts: Counts) -> None:
    """Sums over the devices that share a row, behind both halves of a layer; the drafter's also backward."""
    shape = counts.program.mesh.shape
    row = counts.target.hidden_size * ITEM

    def total(part: str, devices: int, rows: float) -> None:
        counts.part(part).sent += 2 * (devices - 1) / devices * rows * row

    for layer in range(counts.target.num_layers):
        total(mixer_name(counts.target, layer), shape["tensor"], counts.tokens)
        sparse = counts.target.is_sparse(layer)
        total(mlp_name(counts.target), shape["tensor"] * (shape["expert"] if sparse else 1), counts.tokens)
    total("drafter", shape["tensor"] * shape["expert"], counts.tokens)  # the fusion of the taps
    total("drafter", shape["tensor"], 2 * counts.passes * counts.drafter.num_layers * counts.rows / 2)
