"""`dflash serve`: says where it listens, ends when it is told to, and refuses in one line what cannot work."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

import dflash_jax
from dflash_jax import cli
from serve.api.server import Server, answer
from serve.api.starting import Starting, StoppedError
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


@contextmanager
def running(cache: Path, *options: str):
    """(process, its address); it is gone afterwards, whatever happens."""
    compiled = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    process = subprocess.Popen(
        [*SERVE, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | compiled
    )
    watchdog = threading.Timer(240, process.kill)
    watchdog.start()
    try:
        early(process.stderr.readline())
        line = process.stdout.readline()
        found = re.fullmatch(r"serving small at (http://127.0.0.1:\d+), 1 requests at once\n", line)
        assert found, line + process.stderr.read()
        yield process, found[1]
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def early(line: str) -> None:
    """The server listens while it compiles, and says so."""
    found = re.fullmatch(r"compiling (\d+) programs for small at (http://127.0.0.1:\d+)\n", line)
    assert found, line
    health = httpx.get(f"{found[2]}/health")
    assert (health.status_code, health.json()["status"]) == (503, "starting")
    assert health.json()["programs"]["of"] == int(found[1])


def test_who_comes_too_early_is_told_how_far_it_is():
    front = Starting("small")
    with servers.listening(front) as url:
        refused = httpx.post(f"{url}/v1/completions", json={})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        front.progress(3, 40)
        assert "starting, 3 of 40 programs are compiled; send" in httpx.get(f"{url}/").json()["error"]["message"]
        assert httpx.get(f"{url}/health").json() == {
            "status": "starting", "model": "small", "version": dflash_jax.__version__,
            "programs": {"compiled": 3, "of": 40},
        }  # fmt: skip
        front.app = FastAPI()
        assert httpx.get(f"{url}/nothing").json() == {"detail": "Not Found"}
    front.stopped = True
    with pytest.raises(StoppedError):
        front.progress(4, 40)


@pytest.mark.slow
def test_it_serves_until_a_signal(tmp_path):
    """A stream that runs comes to its end; who never sends the rest of a request is waited for, but not for long."""
    servers.write_target(tmp_path / "target")
    options = ("--target", str(tmp_path / "target"), "--model-name", "small", "--api-key", "k")
    with running(tmp_path, *options, "--shutdown-seconds", "4") as (process, url):
        stuck = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        stuck.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
            b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        body = {"model": "small", "prompt": "x", "max_tokens": 60, "stream": True, "temperature": 0}
        headers = {"Authorization": "Bearer k"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as response:
            assert response.status_code == 200
            choices = (event["choices"][0] for event in servers.events(response))
            first = next(choices)
            process.send_signal(signal.SIGTERM)
            rest = list(choices)
        assert rest[-1]["finish_reason"] in ("length", "stop")
        assert len(first["text"] + "".join(choice["text"] for choice in rest)) > 30
        assert process.wait(60) == 0
        assert process.stdout.read() == "stopped\n"
        stuck.close()


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_end_it_and_are_nobody_elses(name, capfd):
    before = signal.getsignal(name)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        idle = socket.create_connection(sock.getsockname())
        killer = threading.Timer(0.5, signal.raise_signal, [name])
        killer.start()
        try:
            answer(Server(FastAPI(), seconds=5, cancel=lambda: None), sock)
        finally:
            killer.cancel()
            idle.close()
    assert signal.getsignal(name) is before
    assert capfd.readouterr() == ("", "")


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
    assert "has 2 devices and there are 1" in refused(capfd, "--mesh", "tensor=2", "--port", "0")
    assert "no/such/folder" in refused(capfd, "--target", "no/such/folder", "--port", "0")


def test_a_missing_extra_is_named(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("serve.command", "serve.api.server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "uvicorn; pip install 'dflash-jax[serve]'" in refused(capfd)
