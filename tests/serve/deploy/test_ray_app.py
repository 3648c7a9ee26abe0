"""Replicas behind Ray Serve: one is killed under load, and no request is lost. Only where ray is installed."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from dflash_jax.decoding.generate import generate
from tests.ports import free_port
from tests.serve import meshes

pytest.importorskip("ray", reason="needs ray: pip install 'dflash-jax[ray]'")
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_killed_replica_loses_no_request(tmp_path):
    from tests.serve.deploy import replicas

    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    meshes.write_pair(tmp_path, selector=True)
    arguments = [str(tmp_path), str(tmp_path / "out.json"), str(free_port())]
    command = [sys.executable, "-m", "tests.serve.deploy.replicas", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    prompts = [body["prompt"] for body in replicas.bodies()]
    settings = {name: [body.get(name, 1.0) for body in replicas.bodies()] for name in ("temperature", "top_p", "seed")}
    expected = generate(meshes.load(tmp_path), prompts, max_new_tokens=replicas.NEW, **settings)
    assert found["texts"] == [generation.text for generation in expected]
    assert max(found["tries"]) > 1  # it had some
    for *_, last in found["streams"]:
        assert last == "data: [DONE]" or json.loads(last.removeprefix("data: "))["error"]["code"] == "stopped"
    assert found["wrong"] == [400, "temperature is -1.0; give a finite number >= 0 (0 is greedy)"]


def test_a_stream_whose_replica_dies_says_so():
    from ray.exceptions import RayActorError

    from serve.deploy.ray_app import _parts

    async def rest():
        yield {"type": "http.response.body", "body": b"data: 2\n\n", "more_body": True}
        raise RayActorError

    async def sent():
        return [part async for part in _parts({"type": "http.response.body", "body": b"data: 1\n\n"}, rest())]

    *before, last = asyncio.run(sent())
    assert before == [b"data: 1\n\n", b"data: 2\n\n"]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "stopped"


def test_options_are_those_of_the_engine():
    from serve.deploy.ray_app import Options, app

    assert app(Options.model_validate({"replicas": "3", "slots": "4", "grammar": "false"})) is not None
    with pytest.raises(ValidationError, match="slotz"):
        Options.model_validate({"slotz": "4"})
