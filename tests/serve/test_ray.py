"""Replicas behind Ray Serve: one is killed under load, and no request is lost. Only where ray is installed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dflash_jax.decoding.generate import generate
from tests import sharded
from tests.serve import meshes, ray_replicas

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install 'dflash-jax[ray]'")
def test_a_killed_replica_loses_no_request(tmp_path):
    sharded.write_pair(tmp_path)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "tests.serve.ray_replicas", str(tmp_path), str(tmp_path / "out.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["pids"] == 2 and found["open"] > 4
    pair, _ = meshes.loaded(tmp_path, None)
    for body, answer in zip(ray_replicas.bodies(), found["answers"], strict=True):
        assert answer["tokens"] == generate(pair, [body.pop("prompt")], **body)[0].tokens
    assert found["wrong"] == {"error": "temperature is -1; give a finite number >= 0 (0 is greedy)", "status": 400}
