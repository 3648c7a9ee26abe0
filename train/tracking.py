"""A run's figures: lines of JSON, TensorBoard, and a line for people."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from train.processes import is_first
from train.step import Metrics

Values = Mapping[str, float | list[float]]


def mean(metrics: list[Metrics]) -> dict[str, float | list[float]]:
    """Waits for the device; means over steps, in float64 so that they do not depend on the order."""
    host = jax.device_get(metrics)
    return {name: np.mean([m[name] for m in host], axis=0, dtype=np.float64).tolist() for name in host[0]}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log. The last one is left out if a crash cut it short."""
    path = folder / "log.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class Tracker:
    """Writes log.jsonl and tensorboard/ in the run's folder, from the first process alone.

    When a run goes on, what was written of steps that a crash undid is dropped.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._board: SummaryWriter | None = None
        if not is_first():
            return
        self.path = folder / "log.jsonl"
        kept = [line for line in read_log(folder) if line["step"] <= first_step]
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        part.replace(self.path)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, step: int, values: Values) -> None:
        """Numbers, and lists of numbers, which TensorBoard shows one by one."""
        if self._board is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            for place, number in enumerate(value if isinstance(value, list) else [value], 1):
                tag = f"{name}/{place}" if isinstance(value, list) else name
                self._board.add_scalar(tag, number, step)
        self._board.flush()


def describe(values: Values) -> str:
    """The single numbers among the metrics, for the bar."""
    return " ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))
