"""`dflash serve`."""

import asyncio
import contextlib
import math
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

import dflash_jax
from dflash_jax.errors import InputError
from dflash_jax.sharding import make_mesh, mesh_sizes
from serve.api.app import create_app
from serve.config import EngineConfig
from serve.engine import Engine

if TYPE_CHECKING:
    from dflash_jax.cli import ServeOptions

LAST_WORDS = 2  # seconds, for answers to requests that were cancelled; then connections are cut


def serve(options: "ServeOptions") -> int:
    """Load, compile, and answer until SIGTERM or SIGINT; the exit status.

    Running requests then have `shutdown_seconds` to end; what is left is cancelled. InputError for what cannot work.
    """
    _check(options)
    key = options.api_key if options.api_key is not None else os.environ.get("DFLASH_API_KEY")
    with _bind(options.host, options.port) as sock:  # before minutes of compiling
        mesh = make_mesh(None, **mesh_sizes(options.mesh)) if options.mesh else None
        pair = dflash_jax.load(options.target, options.drafter, mesh=mesh)
        if pair.tokenizer.can_chat:
            with contextlib.suppress(InputError):  # whoever chats will be told
                pair.tokenizer.render([{"role": "user", "content": ""}])  # imports transformers, which takes seconds
        config = EngineConfig(
            slots=options.slots,
            max_length=options.max_length,
            max_requests=options.max_requests,
            memory_bytes=None if options.memory_mib is None else options.memory_mib * 2**20,
            draft=options.draft,
            logprobs=options.logprobs,
            grammar=options.grammar,
        )
        model = options.model_name or model_name(options.target)
        with Engine(pair, config) as engine:
            app = create_app(engine, model, api_key=key or None, max_body_bytes=options.max_body_bytes)
            line = f"serving {model} at {_address(options.host, sock)}, {options.slots} requests at once"
            answer(app, sock, line, options.shutdown_seconds, app.state.cancel)
    print("stopped", flush=True)
    return 0


def answer(app: FastAPI, sock: socket.socket, line: str, seconds: float, cancel: Callable[[], None]) -> None:
    """Print `line` once it listens, and answer until a signal; `cancel` ends what then runs for some seconds more."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(seconds) + LAST_WORDS,
    )
    server = _Server(config, line, seconds, cancel)

    def end(*_: object) -> None:  # uvicorn has handlers of its own, but not yet, and raises the signal again at its end
        server.should_exit = True

    before = {name: signal.signal(name, end) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[sock])
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, line: str, seconds: float, cancel: Callable[[], None]):
        super().__init__(config)
        self._line, self._seconds, self._cancel = line, seconds, cancel

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._line, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._seconds, self._cancel)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def _check(options: "ServeOptions") -> None:
    if not 0 <= options.port < 2**16:
        raise InputError(f"--port is {options.port}; give 0 to {2**16 - 1}")
    for name in ("max_requests", "max_body_bytes", "shutdown_seconds"):
        if (value := getattr(options, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; give a whole number of at least 1")


def model_name(target: str | None) -> str:
    """What a checkpoint is called where nobody has named it."""
    return "dflash-embedded" if target is None else Path(target).resolve().name if Path(target).is_dir() else target


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
        except OSError:
            sock.close()
            raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot listen at {host}:{port}: {reason}; give another --host or --port") from error
    return sock


def _address(host: str, sock: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
