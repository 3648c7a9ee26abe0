"""A small task for the loop; as a program, one that kills itself: `python -m tests.train.looping FOLDER MOMENT`."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.loop import LoopConfig, Task, run
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import TrainState, init_state, make_step
from train.windows import PackedWindows

LOOP = LoopConfig(steps=12, save_every=4, evaluate_every=6, log_every=2)
VOCAB = 17


class Killed(Exception):
    pass


def stop() -> None:
    raise Killed


def loss(params, frozen, batch):
    logits = params["embedding"][batch[:, :-1]] @ params["kernel"] + params["bias"]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], -1).mean()
    return nll + frozen * 0, {"nll": nll}


def fresh() -> TrainState:
    keys = jax.random.split(jax.random.key(0))
    params = {
        "embedding": jax.random.normal(keys[0], (VOCAB, 8)),
        "kernel": jax.random.normal(keys[1], (8, VOCAB)),
        "bias": jnp.zeros(VOCAB),
    }
    return init_state(params, make_optimizer(OptimizerConfig(), 24))


class Counted:
    """An iterator that does something when it is asked for batch `at`."""

    def __init__(self, batches: Any, at: int | None, then: Callable[[], None]) -> None:
        self.batches, self.at, self.then = batches, at, then

    def __next__(self) -> np.ndarray:
        if self.get_state()["next_index"] == self.at:
            self.then()
        return next(self.batches)

    def get_state(self) -> Any:
        return self.batches.get_state()

    def set_state(self, state: Any) -> None:
        self.batches.set_state(state)


def task(
    kill_at: int | None = None, then: Callable[[], None] = stop, acceptance: Mapping[int, float] | None = None
) -> Task:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 500).astype(np.int32)
    data = Counted(iter(PackedWindows(tokens, 16, seed=3).batches(4)), kill_at, then)

    def evaluate(state: TrainState) -> dict[str, float]:
        step = int(state.step)
        return {"held_out": float(step)} | ({"acceptance_length": acceptance[step]} if acceptance else {})

    return Task(
        step=make_step(loss, make_optimizer(OptimizerConfig(), 24)),
        frozen=jnp.float32(0),
        data=data,
        put=lambda batch, step: jax.device_put(batch),
        evaluate=evaluate,
        tokens_per_step=64,
    )


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(moment: str, folder: Path) -> Task:
    """A task whose process dies in a step, as soon as a checkpoint is being written, or just before it is in place."""
    kind, number = moment.split()
    if kind == "step":
        return task(int(number), kill)
    if kind == "placing":
        rename = Path.rename

        def last(path: Path, to: Any) -> Path:
            return kill() if Path(to).name == number else rename(path, to)

        Path.rename = last
        os.rename = lambda path, to: kill() if Path(to).name == number else os.replace(path, to)
        return task()

    def watch() -> None:
        while not list((folder / "checkpoints").glob(f"{number}.*tmp*/state*")):
            time.sleep(0)
        kill()

    threading.Thread(target=watch, daemon=True).start()
    return task()


if __name__ == "__main__":
    run(fresh(), kill_at(sys.argv[2], Path(sys.argv[1])), LOOP, Path(sys.argv[1]))
