"""The loop both trainers share: steps, checkpoints, exact resume, progress and a log of JSON lines."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import jax
import numpy as np
import rich.progress
from orbax.checkpoint import v1 as ocp

from dflash_jax.errors import InputError
from train.step import Metrics, Pytree, TrainState

Values = Mapping[str, float | list[float]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and when to look up.

    Args:
        steps: the schedule's length
        minutes: stop after so long, with a checkpoint; the same command goes on from there and changes no result
        save_every: steps between checkpoints; the last two are kept
        evaluate_every: steps between held-out losses
        log_every: steps between lines of the log, which hold means over those steps
    """

    steps: int = 4000
    minutes: float | None = None
    save_every: int = 200
    evaluate_every: int = 200
    log_every: int = 10


@dataclasses.dataclass(frozen=True)
class Task:
    """What is particular to one trainer. `batch` must depend on the step number alone."""

    step: Callable[[TrainState, Pytree, Pytree], tuple[TrainState, Metrics]]
    frozen: Pytree
    batch: Callable[[int], Pytree]
    evaluate: Callable[[TrainState], Values]
    tokens_per_step: int


def checkpointer(folder: Path) -> ocp.training.Checkpointer:
    """Keeps the last two checkpoints, each whole or absent."""
    return ocp.training.Checkpointer(
        str(folder.absolute() / "checkpoints"),
        preservation_policy=ocp.training.preservation_policies.LatestN(2),  # pyrefly: ignore
    )


def restore(checkpoints: ocp.training.Checkpointer, state: TrainState) -> TrainState:
    """The newest checkpoint, placed like `state`; `state` itself where there is none."""
    if checkpoints.latest is None:
        return state
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    try:
        return cast(TrainState, checkpoints.load(checkpoints.latest, abstract))
    except (ValueError, KeyError) as error:
        raise InputError(
            f"the checkpoints in {checkpoints.directory} are of another model or optimiser; give a new folder"
        ) from error


class Log:
    """JSON lines; the lines of steps that a crash undid are dropped when a run resumes."""

    def __init__(self, path: Path, first_step: int) -> None:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= first_step))
        self.path = path

    def write(self, step: int, values: Values) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def mean(metrics: list[Metrics]) -> Values:
    """Waits for the device; means over steps, in float64 so that they do not depend on the order."""
    host = jax.device_get(metrics)
    return {name: np.mean([m[name] for m in host], axis=0, dtype=np.float64).tolist() for name in host[0]}


@contextlib.contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    """A bar, moved by calling it with a step and a text."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, speed_estimate_period=120.0) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda step, text: bar.update(task, completed=step, description=text)


def describe(values: dict) -> str:
    """The single numbers among the metrics, for the bar."""
    return " ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))


def run(state: TrainState, task: Task, config: LoopConfig, folder: Path) -> TrainState:
    """Trains from the newest checkpoint in `folder` to `config.steps`, or until `config.minutes` are over.

    A run that was killed at any point and started again gives bit-identical losses and parameters: batches depend
    on the step number alone, and a checkpoint holds parameters, optimiser state and step.
    """
    if config.save_every % config.log_every:
        raise InputError(f"save_every is {config.save_every}, it has to be a multiple of log_every, {config.log_every}")
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * config.minutes if config.minutes else float("inf")
    with checkpointer(folder) as checkpoints:
        state = restore(checkpoints, state)
        first = int(state.step)
        log = Log(folder / "log.jsonl", first)
        with progress(config.steps, first) as show:
            state = _steps(state, task, config, checkpoints, log, show, deadline)
    return state


def _steps(state, task: Task, config: LoopConfig, checkpoints, log: Log, show, deadline: float) -> TrainState:
    pending: list[Metrics] = []
    since = time.monotonic()
    for step in range(int(state.step) + 1, config.steps + 1):
        state, metrics = task.step(state, task.frozen, task.batch(step - 1))
        pending.append(metrics)
        last = step == config.steps
        if last or step % config.log_every == 0:
            values, now = mean(pending), time.monotonic()  # the mean waits for the device
            values = {**values, "tokens_per_second": len(pending) * task.tokens_per_step / (now - since)}
            log.write(step, values)
            show(step, describe(values))
            pending, since, last = [], now, last or now > deadline
        if last or step % config.evaluate_every == 0:
            log.write(step, task.evaluate(state))
            since = time.monotonic()
        if last or step % config.save_every == 0:
            checkpoints.save(step, state)
        if last:
            break
    return state
