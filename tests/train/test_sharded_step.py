"""Training does not depend on the mesh: losses, gradients and parameters are those of one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dflash_jax.sharding import MESH_AXES, state_shardings
from tests.train import sharded_step
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import init_state

pytestmark = pytest.mark.usefixtures("children_share_programs")
ROOT = Path(__file__).parents[2]
MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"expert": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"tensor": 8},  # with a copy of each KV head for each shard of the query heads
]


@pytest.fixture(scope="module")
def expected() -> dict:
    return sharded_step.outcome(None)


def start(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.train.sharded_step", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    log, _ = process.communicate(timeout=500)
    assert process.returncode == 0, log


def assert_same(path: Path, expected: dict) -> None:
    found = np.load(path)
    assert set(found) == set(expected)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    for name, wanted in expected.items():
        size = max(1e-6, np.abs(wanted).max())
        # Parameters after two steps of Muon, which divides by singular values: rounding grows.
        bound = 1e-5 if name.startswith("gradient") else 1e-3
        assert np.abs(found[name] - wanted).max() <= bound * size, name


def test_the_case_has_gradients_everywhere(expected):
    """Else equal gradients would say little."""
    assert expected["losses"][0] != expected["losses"][1]
    assert all(np.abs(x).max() > 1e-5 for name, x in expected.items() if name.startswith("gradient"))


@pytest.fixture(scope="module")
def spread(tmp_path_factory, children_share_programs) -> Path:
    """The folder of the outcomes on all meshes."""
    folder = tmp_path_factory.mktemp("meshes")
    finish(start(folder, *map(json.dumps, MESHES)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MESHES)), ids=map(str, MESHES))
def test_a_mesh_trains_as_one_device_does(expected, spread, number):
    assert_same(spread / f"{number}.npz", expected)


@pytest.mark.slow
def test_two_processes_train_together(expected, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    mesh = json.dumps({"data": 2, "fsdp": 2, "tensor": 2})
    folders = [tmp_path / str(i) for i in range(2)]
    for folder in folders:
        folder.mkdir()
    both = [start(folder, mesh, "--process", i, port) for i, folder in enumerate(folders)]
    for process in both:
        finish(process)
    for folder in folders:
        assert_same(folder / "0.npz", expected)


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_goes_on_on_another(expected, tmp_path):
    meshes = json.dumps({"fsdp": 8}), json.dumps({"expert": 4, "tensor": 2})
    finish(start(tmp_path, *meshes, "--checkpoint"))
    np.testing.assert_allclose(np.load(tmp_path / "0.npz")["losses"], expected["losses"][-1:], rtol=1e-4)


@pytest.mark.slow
def test_a_part_of_the_vocabulary_is_the_same_on_a_mesh(tmp_path):
    meshes = {"expert": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}
    finish(start(tmp_path, *map(json.dumps, meshes), "--sampled"))
    expected = sharded_step.sampled(None)
    for number in range(len(meshes)):
        assert_same(tmp_path / f"{number}.npz", expected)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_moments_lie_where_their_parameters_do(method):
    _, params, _ = sharded_step.pair()
    mesh = AbstractMesh((1, 2, 1, 2), MESH_AXES)
    state = jax.eval_shape(lambda: init_state(params, make_optimizer(OptimizerConfig(method), 10)))
    placed = state_shardings(state, mesh)
    places = jax.tree_util.tree_leaves_with_path(placed.params)
    of_params = {jax.tree_util.keystr(path): s.spec for path, s in places}
    q_proj = placed.params["layers"][0]["attention"]["q_proj"]["kernel"].get_value()
    assert q_proj.spec == PartitionSpec("fsdp", "tensor")
    moments = jax.tree_util.tree_leaves_with_path(placed.optimizer)
    found = dict.fromkeys(of_params, 0)
    for path, where in moments:
        name = next((n for n in found if jax.tree_util.keystr(path).endswith(n)), None)
        assert where.spec == of_params[name] if name else not any(where.spec)
        if name is not None:
            found[name] += 1
    assert min(found.values()) > 0  # a moment at least of each
