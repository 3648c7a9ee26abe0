"""Resuming is exact: a run that is stopped anywhere and started again gives the very same losses and parameters."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.errors import InputError
from train.data import PackedWindows
from train.loop import LoopConfig, Task, run
from train.optimizer import OptimizerConfig, is_matrix, learning_rate, make_optimizer, muon_axes
from train.step import TrainState, init_state, make_step

LOOP = LoopConfig(steps=12, save_every=4, evaluate_every=6, log_every=2)
VOCAB = 17


class Killed(Exception):
    pass


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
    return init_state(params, make_optimizer(OptimizerConfig(), LOOP.steps))


def task(kill_at: int | None = None) -> Task:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 500).astype(np.int32)
    windows = PackedWindows(tokens, 16, 4, seed=3)

    def batch(step: int) -> np.ndarray:
        if step == kill_at:
            raise Killed
        return windows.batch(step)

    step = make_step(loss, make_optimizer(OptimizerConfig(), LOOP.steps))
    return Task(step, jnp.float32(0), batch, lambda state: {"held_out": float(state.step)}, tokens_per_step=64)


def lines(folder: Path) -> list[dict]:
    read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in read]


def same(a: TrainState, b: TrainState) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, TrainState]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(fresh(), task(), LOOP, folder)


@pytest.mark.parametrize("kill_at", [1, 7, 10])
def test_killed_and_resumed_gives_identical_losses_and_parameters(uninterrupted, tmp_path, kill_at):
    with pytest.raises(Killed):
        run(fresh(), task(kill_at), LOOP, tmp_path)
    state = run(fresh(), task(), LOOP, tmp_path)
    assert same(state, uninterrupted[1])
    assert lines(tmp_path) == lines(uninterrupted[0])


def test_a_time_limit_stops_with_a_checkpoint_and_changes_nothing(uninterrupted, tmp_path):
    limited = dataclasses.replace(LOOP, minutes=1e-9)
    assert int(run(fresh(), task(), limited, tmp_path).step) == LOOP.log_every
    assert int(run(fresh(), task(), limited, tmp_path).step) == 2 * LOOP.log_every
    assert same(run(fresh(), task(), LOOP, tmp_path), uninterrupted[1])


def test_a_finished_run_stays_as_it_is(uninterrupted):
    folder, state = uninterrupted
    assert same(run(fresh(), task(kill_at=0), LOOP, folder), state)


def test_two_checkpoints_are_kept(uninterrupted):
    assert sorted(path.name for path in (uninterrupted[0] / "checkpoints").iterdir()) == ["12", "8"]


def test_another_architecture_in_the_same_folder_is_refused(uninterrupted):
    other = dataclasses.replace(fresh(), params={"kernel": jnp.zeros((3, 3))})
    with pytest.raises(InputError, match="another"):
        run(other, task(), LOOP, uninterrupted[0])


def test_checkpoints_between_log_lines_are_refused(tmp_path):
    with pytest.raises(InputError, match="log_every"):
        run(fresh(), task(), dataclasses.replace(LOOP, save_every=3), tmp_path)


def test_learning_rate_warms_up_and_falls_in_steps():
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, warmup=0.1, final=0.1), 100)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10), schedule(100)], [0, 0.5, 1, 0.1], atol=1e-6)


def test_weight_decay_leaves_vectors_and_convolutions_alone():
    tree = {
        "kernel": np.ones((2, 2)),
        "bias": np.ones((2, 2)),
        "mixer": {"conv": np.ones((4, 2, 3)), "A_log": np.ones(3)},
    }
    decayed = jax.tree_util.tree_map_with_path(is_matrix, tree)
    assert decayed == {"kernel": True, "bias": False, "mixer": {"conv": False, "A_log": False}}


def test_muon_moves_every_matrix_of_a_stack_orthogonally():
    shapes = {"fc": (8, 4), "kv_proj": (2, 8, 2, 4), "gate_up": (8, 2, 4)}
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    optimizer = make_optimizer(OptimizerConfig("muon", learning_rate=1.0, weight_decay=0.0, warmup=0.0), 10)
    state = optimizer.init(params)
    _, state = optimizer.update(gradients, state, params)  # warm-up's first step is 0
    updates, _ = optimizer.update(gradients, state, params)
    for name, update in updates.items():
        kernel = np.moveaxis(update["kernel"], int(name == "kv_proj"), -2)
        spread = np.linalg.svd(kernel, compute_uv=False)  # 5 Newton-Schulz steps leave them within 0.7 .. 1.2
        assert spread.max() < 2 * spread.min(), name
        np.testing.assert_allclose(np.sqrt(np.mean(kernel**2)), 0.2, rtol=0.4)


def test_muon_leaves_vocabulary_tables_and_vectors_to_adamw():
    tree = {
        "embed": {"embedding": np.ones((9, 4))},
        "lm_head": {"kernel": np.ones((4, 9))},
        "experts": {"down": np.ones((2, 3, 4))},
        "norm": np.ones(4),
    }
    assert set(jax.tree.leaves(jax.tree_util.tree_map_with_path(muon_axes, tree), is_leaf=lambda x: x is None)) == {
        None
    }
