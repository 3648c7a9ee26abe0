"""The loop of all trainers: steps, checkpoints, exact resume, stopping, and figures."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from dflash_jax.topology import peak_flops
from train.checkpoints import BEST, Checkpoints
from train.progress import bar
from train.step import Metrics, Pytree, TrainState
from train.stopping import listen
from train.tracking import Tracker, Values, describe, mean


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and when to look up.

    Args:
        steps: the schedule's length
        minutes: stop after so long, with a checkpoint; the same command goes on from there and changes no result
        save_every: steps between checkpoints
        keep: the newest so many checkpoints are kept, and the best one
        evaluate_every: steps between held-out figures
        log_every: steps between lines of the log, which hold means over those steps
        peak_flops: of one device, for the model flops utilisation; default: the published peak of a known chip
    """

    steps: int = 4000
    minutes: float | None = None
    save_every: int = 200
    keep: int = 2
    evaluate_every: int = 200
    log_every: int = 10
    peak_flops: float | None = None


class Data(Protocol):
    """An iterator of batches whose place can be saved, as those of grain."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """What is particular to one trainer.

    Args:
        step: (state, frozen, batch) -> (state, metrics)
        frozen: weights that are not trained
        data: host batches
        put: a host batch and its step's number to what `step` takes
        evaluate: held-out figures; `acceptance_length` among them says which checkpoint is the best
        tokens_per_step: of all processes
        flops_per_step: that the model needs, of all devices; 0: not known
    """

    step: Callable[[TrainState, Pytree, Pytree], tuple[TrainState, Metrics]]
    frozen: Pytree
    data: Data
    put: Callable[[Any, int], Pytree]
    evaluate: Callable[[TrainState], Values]
    tokens_per_step: int
    flops_per_step: float = 0.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where a run ended. It is done when all steps are; then `best` is the step of the best checkpoint."""

    state: TrainState
    done: bool
    best: int | None


def run(state: TrainState, task: Task, config: LoopConfig, folder: Path) -> Outcome:
    """Trains from the newest checkpoint in `folder` to `config.steps`, until SIGTERM or `config.minutes` are over.

    A run that was killed at any point and started again gives bit-identical losses and parameters: a checkpoint holds
    parameters, optimiser state, step and the data's place, and everything random comes from a seed and the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with Checkpoints(folder, config.keep) as checkpoints:
        state, place = checkpoints.restore(state)
        if place is not None:
            task.data.set_state(place)
        first = int(state.step)
        with Tracker(folder, first) as tracker, listen() as stop, bar("training", config.steps) as show:
            show(first, "")
            steps = _steps(state, task, config, tracker, show, stop)
            for state, values in steps:
                checkpoints.save(state, task.data.get_state(), values)
        done = int(state.step) >= config.steps
        return Outcome(state, done, checkpoints.best() if done else None)


def best_state(outcome: Outcome, folder: Path, config: LoopConfig) -> TrainState:
    """The state of the best checkpoint of a run that is done."""
    if outcome.best in (None, int(outcome.state.step)):
        return outcome.state
    with Checkpoints(folder, config.keep) as checkpoints:
        return checkpoints.restore(outcome.state, outcome.best)[0]


def _steps(
    state: TrainState, task: Task, config: LoopConfig, tracker: Tracker, show: Callable[[int, str], None],
    stop: Callable[[int], bool],
) -> Iterator[tuple[TrainState, Values]]:  # fmt: skip
    """Trains, and yields (state, held-out figures of this step) whenever it is to be saved."""
    pending: list[Metrics] = []
    since = started = time.monotonic()
    for step in range(int(state.step) + 1, config.steps + 1):
        state, metrics = task.step(state, task.frozen, task.put(next(task.data), step - 1))
        pending.append(metrics)
        last = stop(step) or step == config.steps
        if last or not all(step % every for every in (config.log_every, config.save_every, config.evaluate_every)):
            values, now = mean(pending), time.monotonic()  # the mean waits for the device
            values |= speed(task, config, len(pending), now - since)
            tracker.write(step, values)
            show(step, describe(values))
            pending, since = [], now
            last = last or _over(config, now - started)
        figures: Values = {}
        if step == config.steps or step % config.evaluate_every == 0:
            figures = task.evaluate(state)
            tracker.write(step, figures)
            since = time.monotonic()
        if last or step % config.save_every == 0 or BEST in figures:
            yield state, figures
            since = time.monotonic()
        if last:
            return


def speed(task: Task, config: LoopConfig, steps: int, seconds: float) -> dict[str, float | list[float]]:
    """Tokens a second, and the share of the devices' peak that the model's own arithmetic makes up."""
    values: dict[str, float | list[float]] = {"tokens_per_second": steps * task.tokens_per_step / seconds}
    peak = config.peak_flops or peak_flops(jax.devices()[0].device_kind)
    if peak and task.flops_per_step:
        values["mfu"] = steps * task.flops_per_step / seconds / (peak * jax.device_count())
    return values


def _over(config: LoopConfig, seconds: float) -> bool:
    """Whether the time is up, by the first process' clock."""
    over = config.minutes is not None and seconds > 60 * config.minutes
    if config.minutes is None or jax.process_count() == 1:
        return over
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(over)))
