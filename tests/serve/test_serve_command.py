"""`dflash serve`: says where it listens, ends when it is told to, and refuses in one line what cannot work."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from dflash_jax import cli
from tests.serve import servers

SERVE = [
    sys.executable,
    "-m",
    "dflash_jax",
    "serve",
    "--port",
    "0",
    "--slots",
    "1",
    "--max-length",
    "256",
    "--no-draft",
]


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal(name, tmp_path):
    """A stream that runs then comes to its end, and another that is too long is cut off; the exit status is 0."""
    options = ["--api-key", "k", "--model-name", "small", "--shutdown-seconds", "1" if name == signal.SIGINT else "30"]
    # Both runs compile the same programs.
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path.parent),
    }
    process = subprocess.Popen(
        [*SERVE, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    watchdog = threading.Timer(240, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"serving small at (http://127.0.0.1:\d+), 1 requests at once\n", line)
        assert found, line + process.stderr.read()
        body = {"model": "small", "prompt": "x", "max_tokens": 200, "stream": True, "temperature": 0}
        headers = {"Authorization": "Bearer k"}
        with httpx.stream("POST", f"{found[1]}/v1/completions", json=body, headers=headers, timeout=60) as response:
            assert response.status_code == 200
            stream = servers.events(response)
            text = next(stream)["choices"][0]["text"]
            process.send_signal(name)
            last = None
            for last in stream:
                text += last["choices"][0]["text"]
            assert last["choices"][0]["finish_reason"] in ("length", "stop")
        assert len(text) > 50
        assert process.wait(60) == 0
        assert process.stdout.read() == "stopped\n"
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


def refused(capfd, *options: str) -> str:
    assert cli.main(["serve", *options]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_bad_options(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert re.search(f"cannot listen at 127.0.0.1:{port}: address already in use", refused(capfd, "--port", port))
    assert "--port is 70000" in refused(capfd, "--port", "70000")
    assert "--max-requests is 0" in refused(capfd, "--max-requests", "0")
    assert "--slots takes a whole number, not few" in refused(capfd, "--slots", "few")
    assert "slots is 0" in refused(capfd, "--slots", "0", "--port", "0")
    assert "memory budget is 1 MiB" in refused(capfd, "--memory-mib", "1", "--port", "0")
    assert "no/such/folder" in refused(capfd, "--target", "no/such/folder", "--port", "0")


def test_a_missing_extra_is_named(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "serve.command", raising=False)
    assert "uvicorn; pip install 'dflash-jax[serve]'" in refused(capfd)
