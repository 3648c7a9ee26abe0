"""Trains a DFlash drafter on documents: steps on the loss of `train.objective`, and the figures that go with them.

Source of the method: arXiv 2602.06036.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dflash_jax.checkpoints import load_drafter, load_drafter_config
from dflash_jax.config import DrafterConfig
from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of
from dflash_jax.models.target import Target
from dflash_jax.pair import check_fit
from dflash_jax.text import Tokenizer
from train.architecture import DrafterArchitecture
from train.data import DataConfig, Documents, batched, packed, require_learnable, whole_batches
from train.evaluate import DecodeConfig, decode_figures, evaluator, held_out_metrics, held_out_prompts
from train.feeding import Feed
from train.flops import drafter_flops, target_flops
from train.loop import LoopConfig, Task, best_state, run
from train.memory import compiled
from train.objective import Objective, drafter_loss, drafter_terms
from train.optimizer import OptimizerConfig, make_optimizer
from train.placing import new_state, on_mesh
from train.step import TrainState, make_step
from train.taps import TapCache, make_taps


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterTraining(Objective):
    """How a drafter is trained on the target's responses.

    Args:
        architecture: sizes of the drafter
        loop: steps, checkpoints and evaluation
        optimizer: AdamW or Muon, and the schedule
        decode: the drafter at work on held-out prompts
        batch: rows in a step, of all processes
        parts: micro batches in which a step works on them, with the same result
        spike: a step whose gradient is so many times longer than usual is skipped; 0 skips only what is not finite
    """

    architecture: DrafterArchitecture = dataclasses.field(default_factory=DrafterArchitecture)
    loop: LoopConfig = dataclasses.field(default_factory=lambda: LoopConfig(steps=3000))
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)
    batch: int = 8
    parts: int = 1
    spike: float = 10.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a drafter is trained for and on."""

    target: Target
    tokenizer: Tokenizer
    mask_token: int
    learned: Documents
    held_out: Documents
    data: DataConfig
    out: Path
    mesh: Mesh | None = None
    start: Path | None = None


def check_start(drafter: Path, have: Mapping[Any, nnx.Variable], want: Mapping[Any, nnx.Variable]) -> None:
    """InputError for parameters, or their shapes, that the drafter to train has no place for."""
    for path, variable in have.items():
        if path not in want or want[path].get_value().shape != variable.get_value().shape:
            name = "/".join(map(str, path))
            raise InputError(
                f"start {drafter} has a {name} for which the drafter to train has no place; give its sizes"
            )


def started(state: TrainState, drafter: Path) -> TrainState:
    """A new state whose parameters are those of a drafter, where that has them; the others stay as they are.

    InputError if the two do not fit.
    """
    _, given = load_drafter(drafter, jnp.float32)
    have, want = dict(nnx.to_flat_state(nnx.state(given))), dict(nnx.to_flat_state(state.params))
    check_start(drafter, have, want)
    for path, variable in have.items():
        value = variable.get_value()
        want[path] = want[path].replace(jax.device_put(value, want[path].get_value().sharding))
    return dataclasses.replace(state, params=nnx.from_flat_state(want))


def train_drafter(config: DrafterTraining, setting: Setting) -> tuple[Drafter, bool]:
    """(the drafter, whether it is trained to the end): the best one of a run that is, else as far as it is."""
    target = setting.target
    architecture = config.architecture.drafter_config(target.config, setting.mask_token)
    if setting.start is not None:  # what that one has goes on being trained
        begun = load_drafter_config(setting.start)
        architecture = dataclasses.replace(architecture, mask_embedding=begun.mask_embedding)
    check_fit(target.config, architecture)
    caches = tap_caches(config, setting, architecture)
    if caches is None:
        return Drafter(architecture, dtype=jnp.float32, rngs=nnx.Rngs(config.seed)), False  # not begun
    optimizer = make_optimizer(config.optimizer, config.loop.steps)

    def build() -> Drafter:
        return Drafter(architecture, dtype=jnp.float32, rngs=nnx.Rngs(config.seed))

    graph = nnx.graphdef(nnx.eval_shape(build))
    state = new_state(lambda: nnx.state(build()), optimizer, setting.mesh)
    if setting.start is not None:
        state = started(state, setting.start)
    task = make_task(config, setting, graph, architecture, caches)
    outcome = run(state, task, config.loop, setting.out)
    state = best_state(outcome, setting.out, config.loop) if outcome.done else outcome.state
    return nnx.merge(graph, state.params), outcome.done


def tap_caches(
    config: DrafterTraining, setting: Setting, architecture: DrafterConfig
) -> tuple[TapCache | None, TapCache | None] | None:
    """Of the documents to learn from and the held-out ones; (None, None) for taps made in the step.

    None if their making was stopped.
    """
    if setting.data.taps == "online":
        return None, None
    caches: list[TapCache | None] = []
    for name, documents in (("learned", setting.learned), ("held_out", setting.held_out)):
        folder = setting.out / "taps" / name
        made = None
        if len(documents):
            made = make_taps(setting.target, architecture.tap_ids, documents, folder, setting.mesh, config.batch)
            if made is None:
                return None
        caches.append(made)
    return caches[0], caches[1]


def make_task(
    config: DrafterTraining,
    setting: Setting,
    graph: nnx.GraphDef,
    architecture: DrafterConfig,
    caches: tuple[TapCache | None, TapCache | None],
) -> Task:
    """The drafter's part of the loop."""
    target, data, mesh = setting.target, setting.data, setting.mesh
    feed = Feed(config.batch, mesh)
    target_graph, frozen = nnx.split(target)
    graphs = graph, target_graph
    terms = functools.partial(drafter_terms, graphs, config)
    loss = functools.partial(drafter_loss, graphs, dataclasses.replace(config, vocabulary=0))
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    step = compiled(make_step(terms, optimizer, parts=config.parts, spike=config.spike))
    held_out = whole_batches(setting.held_out, length=data.length, size=config.batch)
    metrics = held_out_metrics(loss, frozen, held_out, feed, caches[1])
    prompts = held_out_prompts(setting.held_out, config.decode.prompts)
    decode = functools.partial(
        decode_figures, target, tokenizer=setting.tokenizer, prompts=prompts, config=config.decode, mesh=mesh
    )

    def on_the_mesh(*arguments: Any) -> Any:
        with on_mesh(mesh):
            return step(*arguments)

    return Task(
        step=on_the_mesh,
        frozen=frozen,
        data=training_data(config, setting, feed, caches[0]),
        put=feed.put,
        evaluate=evaluator(graph, target, metrics, decode, mesh),
        tokens_per_step=config.batch * data.length,
        flops_per_step=step_flops(config, setting, architecture),
    )


def for_the_step(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the step takes of a batch."""
    return {name: x for name, x in batch.items() if name != "document"}


def training_data(config: DrafterTraining, setting: Setting, feed: Feed, cache: TapCache | None) -> Any:
    """The iterator of this process' rows."""
    data = setting.data
    require_learnable(setting.learned)
    rows = packed(setting.learned, length=data.length, bins=data.bins, seed=data.seed, threads=data.threads)

    def finish(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        own = feed.own(batch)
        return for_the_step(cache.add(own) if cache else own)

    return iter(batched(rows, config.batch, finish))


def step_flops(config: DrafterTraining, setting: Setting, architecture: DrafterConfig) -> float:
    """Of all devices, as `train.flops` counts them."""
    length = setting.data.length
    tokens = config.batch * length
    state = nnx.state(shapes_of(lambda rngs: Drafter(architecture, rngs=rngs)))
    vocab = config.vocabulary or architecture.vocab_size
    flops = drafter_flops(architecture, state, tokens=tokens, anchors=config.anchors, length=length, vocab=vocab)
    if setting.data.taps == "online":
        flops += tokens * target_flops(setting.target.config, nnx.state(setting.target), length)
    return flops
