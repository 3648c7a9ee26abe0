"""While models are loaded and programs compiled: the server listens already, and says how far it is."""

from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from dflash_jax.version import __version__
from serve.api.errors import ApiError, response

RETRY_AFTER = {"Retry-After": "5"}  # seconds


class StoppedError(Exception):
    """The server was told to end before it had started."""


class Starting:
    """In the place of an application until that is there, as `app`: all requests get status 503."""

    def __init__(self, model: str):
        self.app: FastAPI | None = None
        self.stopped = False
        self.model, self._done, self._count = model, 0, 0

    def progress(self, done: int, count: int) -> None:
        """So many programs are compiled, of so many. StoppedError where nobody waits for them any more."""
        if self.stopped:
            raise StoppedError
        self._done, self._count = done, count

    def cancel(self) -> None:
        """End every request."""
        if self.app is not None:
            self.app.state.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
            return
        answer = self._health() if scope["path"] == "/health" else response(self._error())
        await answer(scope, receive, send)

    def _health(self) -> JSONResponse:
        programs = {"compiled": self._done, "of": self._count}
        state = {"status": "starting", "model": self.model, "version": __version__, "programs": programs}
        return JSONResponse(state, 503, RETRY_AFTER)

    def _error(self) -> ApiError:
        far = f"{self._done} of {self._count} programs are compiled" if self._count else "the models are being loaded"
        message = f"the server is starting, {far}; send the request again in some seconds"
        return ApiError(503, message, code="starting", headers=RETRY_AFTER)
