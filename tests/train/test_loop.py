"""Resuming is exact: a run that is stopped anywhere and started again gives the very same losses and parameters."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dflash_jax.errors import InputError
from tests.train.looping import LOOP, Killed, fresh, task
from train.checkpoints import Checkpoints
from train.loop import Outcome, best_state, run, speed
from train.step import TrainState
from train.tracking import Tracker


def lines(folder: Path) -> list[dict]:
    read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("tokens_per_second", "mfu")} for line in read]


def same(a: TrainState, b: TrainState) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, TrainState]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(fresh(), task(), LOOP, folder).state


@pytest.mark.parametrize("kill_at", [1, 7, 10])
def test_broken_off_and_resumed_gives_identical_losses_and_parameters(uninterrupted, tmp_path, kill_at):
    with pytest.raises(Killed):
        run(fresh(), task(kill_at), LOOP, tmp_path)
    assert same(run(fresh(), task(), LOOP, tmp_path).state, uninterrupted[1])
    assert lines(tmp_path) == lines(uninterrupted[0])


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_it_never_was(uninterrupted, tmp_path):
    """SIGKILL in a step, while a checkpoint is written, when it is written but not yet in its place, in a step."""
    found = []
    for moment in ("step 3", "writing 4", "placing 8", "step 10"):
        command = [sys.executable, "-m", "tests.train.looping", str(tmp_path), moment]
        done = subprocess.run(command, env={**os.environ}, timeout=120, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        steps = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        found.append(sorted(name for name in steps if name.isdecimal()))
        if "step" not in moment:
            assert any("tmp" in name for name in steps), steps
    assert found[:3] == [[], [], ["4"]] and found[3] in (["4"], ["4", "8"])  # 8 may be on its way when step 10 dies
    assert same(run(fresh(), task(), LOOP, tmp_path).state, uninterrupted[1])
    assert lines(tmp_path) == lines(uninterrupted[0])
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name]


def test_sigterm_saves_the_step_under_way(uninterrupted, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    at = LOOP.save_every + 1
    outcome = run(fresh(), task(at, lambda: os.kill(os.getpid(), signal.SIGTERM)), LOOP, tmp_path)
    assert not outcome.done and int(outcome.state.step) == at + 1
    assert signal.getsignal(signal.SIGTERM) is before
    outcome = run(fresh(), task(), dataclasses.replace(LOOP, log_every=1), tmp_path)
    assert outcome.done and same(outcome.state, uninterrupted[1])


def test_a_time_limit_stops_with_a_checkpoint_and_changes_nothing(uninterrupted, tmp_path):
    limited = dataclasses.replace(LOOP, minutes=1e-9)
    assert int(run(fresh(), task(), limited, tmp_path).state.step) == LOOP.log_every
    assert int(run(fresh(), task(), limited, tmp_path).state.step) == 2 * LOOP.log_every
    assert same(run(fresh(), task(), LOOP, tmp_path).state, uninterrupted[1])


def test_a_finished_run_stays_as_it_is(uninterrupted):
    folder, state = uninterrupted
    outcome = run(fresh(), task(kill_at=0), LOOP, folder)
    assert outcome.done and same(outcome.state, state)


def test_the_newest_checkpoints_are_kept_and_the_best(tmp_path):
    lengths = {6: 2.5, 12: 3.5, 18: 3.0, 24: 3.1}
    config = dataclasses.replace(LOOP, steps=24, keep=2)
    outcome = run(fresh(), task(acceptance=lengths), config, tmp_path)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [12, 20, 24]
    assert outcome.best == 12
    best = best_state(outcome, tmp_path, config)
    assert int(best.step) == 12 and not same(best, outcome.state)
    assert best_state(Outcome(outcome.state, True, 24), tmp_path, config) is outcome.state


def test_a_checkpoint_has_the_place_in_the_data(tmp_path):
    made = task()
    state = run(fresh(), made, dataclasses.replace(LOOP, steps=5), tmp_path).state
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.restore(fresh())[1] == made.data.get_state()
        assert same(checkpoints.restore(fresh())[0], state)


def test_another_architecture_in_the_same_folder_is_refused(uninterrupted):
    other = dataclasses.replace(fresh(), params={"kernel": jnp.zeros((3, 3))})
    with pytest.raises(InputError, match="another"):
        run(other, task(), LOOP, uninterrupted[0])


def test_a_lost_optimiser_state_would_show(uninterrupted, tmp_path):
    """What the tests above compare does depend on the optimiser's state."""
    state = run(fresh(), task(), dataclasses.replace(LOOP, steps=8), tmp_path).state
    blank = dataclasses.replace(state, optimizer=fresh().optimizer)
    made = task()
    for _ in range(8):
        next(made.data)
    for step in range(8, 12):
        blank, _ = made.step(blank, made.frozen, made.put(next(made.data), step))
    assert not same(blank, uninterrupted[1])


def test_speed_counts_tokens_and_flops_of_all_devices():
    made = dataclasses.replace(task(), tokens_per_step=100, flops_per_step=3e9)
    values = speed(made, dataclasses.replace(LOOP, peak_flops=1e10), steps=4, seconds=2.0)
    assert values == {"tokens_per_second": 200.0, "mfu": 4 * 3e9 / 2 / 1e10 / jax.device_count()}
    assert "mfu" not in speed(made, LOOP, 4, 2.0)  # the peak of this CPU is not known


def events(folder: Path) -> list[tuple[str, int, float]]:
    """All scalars of TensorBoard's files, read record by record."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            place += 12 + size + 4
    return found


def test_figures_go_to_tensorboard_too(tmp_path):
    with Tracker(tmp_path, 0) as tracker:
        tracker.write(3, {"loss": 0.5, "accuracy": [0.75, 0.25]})
    assert events(tmp_path) == [("loss", 3, 0.5), ("accuracy/1", 3, 0.75), ("accuracy/2", 3, 0.25)]


def test_a_log_that_a_crash_cut_short_goes_on(tmp_path):
    with Tracker(tmp_path, 0) as tracker:
        for step in range(1, 6):
            tracker.write(step, {"loss": 1.0})
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text()[:-9])
    with Tracker(tmp_path, 3) as tracker:
        tracker.write(4, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
