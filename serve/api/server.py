"""uvicorn, ended by a signal or from any thread, with time for those who are still served."""

import asyncio
import math
import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

LAST_WORDS = 2  # seconds, for answers to requests that were cancelled; then connections are cut


class Server(uvicorn.Server):
    """Answers until it is stopped; `cancel` ends what then runs for some seconds more."""

    def __init__(self, app: ASGIApp, seconds: float, cancel: Callable[[], None]):
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=math.ceil(seconds) + LAST_WORDS,
        )
        super().__init__(config)
        self._seconds, self._cancel = seconds, cancel

    def stop(self, *_: object) -> None:
        """From any thread, and as the handler of a signal."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._seconds, self._cancel)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def answer(server: Server, sock: socket.socket) -> None:
    """Until a signal."""
    # uvicorn has handlers of its own, but not yet, and raises the signal again at its end.
    before = {name: signal.signal(name, server.stop) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[sock])
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
