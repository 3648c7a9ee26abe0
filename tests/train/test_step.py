"""One optimiser step: micro batches, the guard against bad steps, and the optimisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.errors import InputError
from train.losses import Ratio, weighted
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import TrainState, gradients_of, init_state, make_step, split

CONFIG = OptimizerConfig(learning_rate=0.1, warmup=0.0)


def params() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return {"kernel": jax.random.normal(keys[0], (4, 3)), "bias": jax.random.normal(keys[1], (3,))}


def batch(seed: int = 0, size: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(2, size, 3)) * (np.arange(size)[:, None] < 8)
    return {
        "x": rng.normal(size=(size, 4)).astype(np.float32),
        "y": rng.normal(size=(size, 3)).astype(np.float32),
        "first": weights[0].astype(np.float32),
        "second": weights[1].astype(np.float32),
        "step": np.uint32(3),
    }


def loss(params, frozen, batch):
    error = batch["x"] @ params["kernel"] + params["bias"] - batch["y"]
    terms = {"first": weighted(error**2, batch["first"]), "second": weighted(jnp.abs(error), batch["second"])}
    metrics = {"error": weighted(error, batch["first"]), "columns": Ratio(error.sum(0), jnp.full(3, 1.0 * len(error)))}
    return terms, metrics


def dense(params, batch) -> jax.Array:
    error = batch["x"] @ params["kernel"] + params["bias"] - batch["y"]
    parts = jnp.sum(error**2 * batch["first"]) / batch["first"].sum()
    return parts + jnp.sum(jnp.abs(error) * batch["second"]) / batch["second"].sum()


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_parts_are_added_before_anything_is_divided(parts):
    given = batch()
    value, metrics, gradients = jax.jit(lambda p, b: gradients_of(loss, p, None, b, parts))(params(), given)
    wanted, expected = jax.value_and_grad(dense)(params(), given)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradients, expected)
    error = given["x"] @ params()["kernel"] + params()["bias"] - given["y"]
    np.testing.assert_allclose(metrics["error"], np.average(error, weights=given["first"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["columns"], error.mean(0), rtol=1e-4, atol=1e-6)


def test_parts_take_turns_and_keep_their_numbers():
    cut = split({"x": np.arange(6), "step": np.uint32(4)}, 3)
    np.testing.assert_array_equal(cut["x"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(cut["row"], cut["x"])
    np.testing.assert_array_equal(cut["step"], [4, 4, 4])
    with pytest.raises(InputError, match="a batch of 6 sequences cannot be worked on in 4 equal parts"):
        split({"x": np.arange(6)}, 4)


def fresh() -> TrainState:
    return init_state(params(), make_optimizer(CONFIG, 100))


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_that_is_not_finite_changes_nothing_and_is_reported(parts):
    step = make_step(loss, make_optimizer(CONFIG, 100), parts=parts)
    state, metrics = step(fresh(), None, batch())
    assert metrics["skipped"] == 0
    before = jax.device_get(state)
    bad = batch(1)
    bad["x"][0, 0] = np.nan
    state, metrics = step(state, None, bad)
    assert metrics["skipped"] == 1
    assert_equal((state.params, state.optimizer, state.norm), (before.params, before.optimizer, before.norm))
    assert state.step == 2
    state, metrics = step(state, None, batch(2))
    assert metrics["skipped"] == 0 and not np.array_equal(state.params["bias"], before.params["bias"])


def scaled(factor: float) -> dict[str, np.ndarray]:
    """Gradients grow with the square of the factor: targets are 0, biases small."""
    given = batch()
    return given | {"x": given["x"] * factor, "y": given["y"] * 0}


def test_a_spike_is_skipped_and_a_lasting_rise_is_not_for_ever():
    step = make_step(loss, make_optimizer(CONFIG, 100), spike=10.0)
    state, metrics = step(fresh(), None, scaled(1.0))
    usual = float(metrics["gradient_norm"])
    before = jax.device_get(state)
    state, metrics = step(state, None, scaled(10.0))
    assert metrics["gradient_norm"] > 10 * usual and metrics["skipped"] == 1
    assert_equal((state.params, state.optimizer), (before.params, before.optimizer))
    state, metrics = step(state, None, scaled(1.0))
    assert metrics["skipped"] == 0
    skipped = 0
    for _ in range(40):
        state, metrics = step(state, None, scaled(10.0))
        skipped += int(metrics["skipped"])
        if not metrics["skipped"]:
            break
    assert 2 < skipped < 40
    off = make_step(loss, make_optimizer(CONFIG, 100), spike=0.0)
    state, _ = off(fresh(), None, scaled(1.0))
    assert off(state, None, scaled(10.0))[1]["skipped"] == 0


def updates(config: OptimizerConfig, gradients, steps: int = 2):
    """Of the last step; the first one's learning rate is 0."""
    optimizer = make_optimizer(config, 100)
    state = optimizer.init(params())
    for _ in range(steps):
        out, state = optimizer.update(gradients, state, params())
    return out


def test_gradients_are_clipped_by_their_common_norm():
    config = OptimizerConfig("muon", learning_rate=0.1, warmup=0.0, clip=0.5, weight_decay=0.0)
    gradients = jax.tree.map(lambda x: 3 * x, params())
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradients)))
    by_hand = jax.tree.map(lambda x: x * 0.5 / norm, gradients)
    clipped, small = updates(config, gradients), updates(config, by_hand)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), clipped, small)
    state = make_optimizer(config, 100).init(params())
    _, state = make_optimizer(config, 100).update(gradients, state, params())
    moments = [x for x in jax.tree.leaves(state) if x.shape == (4, 3)]
    np.testing.assert_allclose(moments[0], 0.05 * by_hand["kernel"], rtol=1e-4)  # Muon's momentum of 0.95


def test_what_muon_leaves_out_has_a_learning_rate_of_its_own():
    one = updates(OptimizerConfig("muon", learning_rate=0.1, warmup=0.0), params())
    two = updates(OptimizerConfig("muon", learning_rate=0.1, adam_learning_rate=0.01, warmup=0.0), params())
    np.testing.assert_allclose(one["kernel"], two["kernel"], rtol=1e-6)
    np.testing.assert_allclose(one["bias"], 10 * two["bias"], rtol=1e-5)
