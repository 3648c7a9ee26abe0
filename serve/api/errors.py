"""What a sender is told when something is wrong: OpenAI's error object, with one line that says what to do."""

import reprlib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from dflash_jax.errors import InputError, TooLongError
from serve.engine import Busy

_SHORT = reprlib.Repr()  # looks at no more of a large value than it shows
_SHORT.maxstring, _SHORT.maxlevel = 60, 3
RETRY_AFTER = 1  # seconds; a slot is free again after one short answer


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def error_object(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The `error` that OpenAI's clients look for."""
    line = " ".join(message.split()).encode("utf-8", "replace").decode()  # what was sent may hold half a character
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": line, "type": kind, "param": None, "code": code}}


def as_api_error(error: Exception) -> ApiError:
    """What to tell the sender about an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        too_long = isinstance(error, TooLongError)
        return ApiError(400, str(error), code="context_length_exceeded" if too_long else None)
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(RETRY_AFTER)})
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server failed at this request; its log says more")


def describe(error: ValidationError) -> str:
    """The first thing that is wrong with a body, and how many more there are."""
    found = error.errors(include_url=False, include_context=False)
    first = found[0]
    place, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    given = f", not {_short(first['input'])}" if place and message.startswith("Input should be") else ""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{place}: {message}{given}{more}" if place else f"the body cannot be read: {message}{more}"


def _short(value: Any) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def response(error: Exception) -> JSONResponse:
    """The answer for an exception."""
    told = as_api_error(error)
    return JSONResponse(error_object(told.status, str(told), told.code), told.status, told.headers)


def install(app: FastAPI) -> None:
    """Answer every exception in this form; the unexpected ones are logged as well."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        return response(error)

    for kind in (ApiError, InputError, Busy, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
