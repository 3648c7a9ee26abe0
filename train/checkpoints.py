"""Checkpoints of a run, written while it goes on: state, place in the data, and how good it was."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
from orbax.checkpoint import v1 as ocp

from dflash_jax.errors import InputError
from train.step import TrainState

BEST = "acceptance_length"
NAME = "checkpoints"  # the folder of them in that of a run


def check_stored(folder: Path, state: TrainState) -> None:
    """InputError where the newest checkpoint of a run in `folder` has other shapes than `state`, which may be abstract.

    Only what describes the checkpoint is read, and nothing is tidied: a run may be at work there.
    """
    stored = [path for path in (folder / NAME).glob("*") if path.name.isdecimal()]
    if not stored:
        return
    newest = max(stored, key=lambda path: int(path.name))
    have = jax.tree.leaves(ocp.metadata(str(newest.absolute())).metadata)
    if _shapes(have) != _shapes(jax.tree.leaves(state)):
        raise _other(folder / NAME)


def _shapes(arrays: Iterable[Any]) -> list[tuple[int, ...]]:
    return sorted(tuple(array.shape) for array in arrays)


def _other(folder: Any) -> InputError:
    return InputError(f"the checkpoints in {folder} are of another model or optimiser; give a new folder")


class Checkpoints:
    """The newest `keep` checkpoints of a run and the best one; each is whole or absent.

    A checkpoint holds the parameters, the optimiser's state and the step, of which with the seed all random numbers
    are made, and the state of the data's iterator. The best is the one with the largest acceptance length.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=lambda metrics: metrics[BEST], n=1, keep_checkpoints_without_metrics=False)
        self._checkpointer = ocp.training.Checkpointer(
            str(folder.absolute() / NAME),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),  # pyrefly: ignore
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: TrainState, data: Any, values: Mapping[str, Any]) -> None:
        """Returns as soon as the state is copied; waits first for the checkpoint before."""
        step = int(state.step)
        if step in self.steps:
            return
        metrics: Any = {BEST: float(values[BEST])} if BEST in values else None
        place: Any = {"data": json.dumps(data)}
        self._checkpointer.save_async(step, cast(Any, state), force=True, metrics=metrics, custom_metadata=place)

    def restore(self, state: TrainState, step: int | None = None) -> tuple[TrainState, Any]:
        """(state, state of the data's iterator) of a step, by default the newest; (`state`, None) where there is none.

        What is restored goes where `state` is, which may be another mesh than it was saved from. InputError for
        checkpoints of another model or optimiser.
        """
        if not self.steps:
            return state, None
        step = self.steps[-1] if step is None else step
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        try:
            restored = cast(TrainState, self._checkpointer.load(step, abstract))
        except (ValueError, KeyError) as error:
            raise _other(self._checkpointer.directory) from error
        metadata = cast(dict, self._checkpointer.metadata(step).custom_metadata)
        return restored, json.loads(metadata["data"])

    def best(self) -> int | None:
        """The step with the largest acceptance length, the latest of those; the newest where none was measured."""
        self._checkpointer.wait()
        rated = [(cast(dict, c.metrics)[BEST], c.step) for c in self._checkpointer.checkpoints if c.metrics]
        return max(rated)[1] if rated else (self.steps or [None])[-1]
