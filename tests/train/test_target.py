import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash_jax.checkpoints import load_target, save_target
from tests.train import tiny
from train import corpus
from train.loop import LoopConfig
from train.target import TargetTraining, load_balance, train_target


@pytest.fixture
def config(tmp_path, monkeypatch) -> TargetTraining:
    documents = tuple(corpus.Document(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 40) for i in range(8))
    monkeypatch.setattr(corpus, "split", lambda: (documents[:6], documents[6:]))
    loop = LoopConfig(steps=6, save_every=2, evaluate_every=2, log_every=2)
    return TargetTraining(
        tmp_path / "a", tmp_path / "tokenizer", 300, tiny.TARGET, loop, sequence=32, batch=4, held_out=4
    )


def log(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def test_training_learns_resumes_exactly_and_exports(config, tmp_path):
    whole, done = train_target(config)
    first = log(config.out)
    assert done
    shutil.rmtree(config.out / "checkpoints" / "6")  # as if killed after step 4
    resumed, _ = train_target(config)
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(model) for model in (whole, resumed)))
    losses = [line["held_out_nll"] for line in log(config.out) if "held_out_nll" in line]
    assert losses == sorted(losses, reverse=True) and len(losses) == 3
    assert log(config.out) == first

    save_target(whole, tmp_path / "model")
    read_config, read = load_target(tmp_path / "model", jnp.float32)
    assert read_config == whole.config
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(model) for model in (whole, read)))


def test_load_balance_is_one_when_experts_share_alike_and_more_when_they_do_not():
    even = jnp.asarray(np.tile(np.eye(4) * 9, (8, 1)))
    assert load_balance(even, 1) == pytest.approx(1, rel=1e-3)
    assert load_balance(jnp.asarray(np.tile([9.0, 0, 0, 0], (8, 1))), 1) > 3.9
