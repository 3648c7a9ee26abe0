"""The engine on 8 devices, of one process or of two, gives the tokens of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dflash_jax.errors import InputError
from serve.config import EngineConfig, resolve
from tests.ports import free_port
from tests.serve import engines, meshes

ROOT = Path(__file__).parents[2]


def start(*arguments, devices):
    """`tests.serve.meshes` with so many virtual devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.serve.meshes", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    log, _ = process.communicate(timeout=500)
    assert process.returncode == 0, log


@pytest.mark.slow
def test_a_mesh_gives_the_tokens_of_one_device(tmp_path):
    """Experts, heads, recurrent state and vocabulary are spread; the requests take turns in two slots."""
    meshes.write_pair(tmp_path, selector=True)
    process = start(tmp_path, tmp_path / "out.json", "expert=4,tensor=2", devices=8)
    one = meshes.load(tmp_path)
    expected, scores = meshes.expected(one), meshes.scores(one)
    finish(process)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] == expected
    np.testing.assert_allclose(found["scores"], scores, atol=1e-4)


@pytest.mark.slow
def test_two_processes_serve_together(tmp_path):
    """The leader's tokens are those of one device, and the other process has counted what the leader has.

    The width adapts, by times that only the leader has measured. What a DFlash 2 selector draws depends on it, so this
    drafter has none: then the tokens are those of plain sampling, whatever the width.
    """
    meshes.write_pair(tmp_path, selector=False)
    ports = [free_port() for _ in range(2)]
    out = [tmp_path / f"{i}.json" for i in range(2)]
    both = [start(tmp_path, out[i], "expert=4,tensor=2", i, *ports, devices=4) for i in range(2)]
    one = meshes.load(tmp_path)
    expected, scores = meshes.expected(one), meshes.scores(one)
    for process in both:
        finish(process)
    leader, other = (json.loads(path.read_text()) for path in out)
    assert leader["tokens"] == expected
    np.testing.assert_allclose(leader["scores"], scores, atol=1e-4)
    assert leader["counted"] == other["counted"]
    assert other["counted"]["finished"] == "6" and other["counted"]["cancelled"] == "1"


def test_a_mesh_that_spreads_the_batch_is_refused(monkeypatch):
    monkeypatch.setattr(type(engines.pair()), "batch_multiple", 2)
    with pytest.raises(InputError, match="spreads the batch over 2 devices"):
        resolve(engines.pair(), EngineConfig(slots=1))
