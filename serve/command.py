"""`dflash serve`."""

import contextlib
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import dflash_jax
from dflash_jax.errors import InputError
from dflash_jax.sharding import make_mesh, mesh_sizes
from serve.api.app import create_app
from serve.api.server import Server, answer
from serve.api.starting import Starting, StoppedError
from serve.config import EngineConfig, resolve
from serve.engine import Engine

if TYPE_CHECKING:
    from dflash_jax.cli import ServeOptions

BACKLOG = 2048  # connections that wait to be accepted
TOLD_EVERY = 5  # seconds


def serve(options: "ServeOptions") -> int:
    """Listen, load, compile, and answer until SIGTERM or SIGINT; the exit status.

    Running requests then have `shutdown_seconds` to end; what is left is cancelled. InputError for what cannot work.
    """
    _check(options)
    front = Starting(options.model_name or model_name(options.target))
    with _bind(options.host, options.port) as sock, ThreadPoolExecutor(1) as pool:
        server = Server(front, options.shutdown_seconds, front.cancel)
        made = pool.submit(_make, options, front, _address(options.host, sock))
        made.add_done_callback(lambda done: server.stop() if done.exception() else None)
        try:
            answer(server, sock)
        finally:
            front.stopped = True
    with contextlib.suppress(StoppedError):
        made.result().close()
    print("stopped", flush=True)
    return 0


def _make(options: "ServeOptions", front: Starting, address: str) -> Engine:
    """The engine, started and in front of everybody."""
    mesh = make_mesh(None, **mesh_sizes(options.mesh)) if options.mesh else None
    config = _engine_config(options)
    pair = dflash_jax.load(options.target, options.drafter, mesh=mesh, check=partial(resolve, c=config))
    if pair.tokenizer.can_chat:
        with contextlib.suppress(InputError):  # whoever chats will be told
            pair.tokenizer.render([{"role": "user", "content": ""}])  # imports transformers, which takes seconds
    told = _Told(f"{front.model} at {address}")

    def progress(done: int, count: int) -> None:
        front.progress(done, count)
        told(done, count)

    engine = Engine(pair, config, progress).start()
    key = options.api_key if options.api_key is not None else os.environ.get("DFLASH_API_KEY")
    front.app = create_app(
        engine,
        front.model,
        api_key=key or None,
        max_body_bytes=options.max_body_bytes,
        reasoning=options.reasoning,
    )
    print(f"serving {told.what}, {options.slots} requests at once", flush=True)
    return engine


def _engine_config(options: "ServeOptions") -> EngineConfig:
    return EngineConfig(
        slots=options.slots,
        max_length=options.max_length,
        max_requests=options.max_requests,
        memory_bytes=None if options.memory_mib is None else options.memory_mib * 2**20,
        draft=options.draft,
        logprobs=options.logprobs,
        grammar=options.grammar,
    )


class _Told:
    """Lines on stderr about programs that are compiled, one every few seconds."""

    def __init__(self, what: str):
        self.what = what
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, count: int) -> None:
        now = time.monotonic()
        if not done:
            self._start = self._last = now
            print(f"compiling {count} programs for {self.what}", file=sys.stderr, flush=True)
        elif now - self._last >= TOLD_EVERY:
            self._last = now
            print(f"{done} of {count} programs compiled, {now - self._start:.0f} s", file=sys.stderr, flush=True)


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
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot listen at {host}:{port}: {reason}; give another --host or --port") from error
    return sock


def _address(host: str, sock: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
