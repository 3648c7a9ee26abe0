"""The engine on 8 devices, gives the tokens of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_jax.errors import InputError
from serve.config import EngineConfig, resolve
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
    expected = meshes.expected(meshes.load(tmp_path))
    finish(process)
    assert json.loads((tmp_path / "out.json").read_text()) == expected


def test_a_mesh_that_spreads_the_batch_is_refused(monkeypatch):
    monkeypatch.setattr(type(engines.pair()), "batch_multiple", 2)
    with pytest.raises(InputError, match="spreads the batch over 2 devices"):
        resolve(engines.pair(), EngineConfig(slots=1))
