"""The engine on 8 devices, of one process or of two, gives the tokens of one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_jax.errors import InputError
from serve.config import EngineConfig, resolve
from tests import sharded
from tests.serve import engines, meshes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pair")
    sharded.write_pair(path)
    return path


@pytest.fixture(scope="module")
def expected(folder):
    return json.loads(json.dumps(meshes.answers(folder, None)))


def start(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.serve.meshes", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    log, _ = process.communicate(timeout=500)
    assert process.returncode == 0, log


@pytest.mark.slow
def test_a_mesh_gives_the_tokens_of_one_device(folder, expected, tmp_path):
    """Experts, heads, recurrent state and vocabulary are spread; five requests take turns in two slots."""
    mesh = json.dumps({"expert": 4, "tensor": 2})
    finish(start(folder, tmp_path / "out.json", mesh))
    assert any(max(lengths) > 1 for _, lengths in expected)
    assert json.loads((tmp_path / "out.json").read_text()) == {mesh: expected}


@pytest.mark.slow
def test_two_processes_serve_together(folder, expected, tmp_path):
    """The leader's tokens are those of one device, and the other process has counted what it has counted.

    The width adapts, by times that only the leader has measured.
    """
    ports = [free_port() for _ in range(2)]
    mesh = json.dumps({"expert": 4, "tensor": 2})
    both = [start(folder, tmp_path / f"{i}.json", mesh, "--process", i, *ports) for i in range(2)]
    for process in both:
        finish(process)
    leader, other = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert leader["tokens"] == [tokens for tokens, _ in expected]
    assert leader["counted"] == other["counted"]
    assert other["counted"]["finished"] == "5" and other["counted"]["cancelled"] == "1"


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_a_mesh_that_spreads_the_batch_is_refused(monkeypatch):
    monkeypatch.setattr(type(engines.pair()), "batch_multiple", 2)
    with pytest.raises(InputError, match="spreads the batch over 2 devices"):
        resolve(engines.pair(), EngineConfig(slots=1))
