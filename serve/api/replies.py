"""Answers from generations: whole, or as a stream of server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dflash_jax.decoding.output import Generation, Piece
from serve.api.calls import Call, Gone, unless_gone
from serve.api.errors import ApiError, error_object

Choice = dict[str, Any]


class Reply:
    """One answer; how its choices look is up to the subclass. All methods get the choice's index."""

    kind = chunk_kind = ""  # the `object` of a whole answer, and of a part
    prefix = ""  # of its id

    def __init__(self, model: str, choices: int):
        """`choices` for each prompt."""
        self.choices = choices
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def begin(self, index: int) -> list[Choice]:
        """What a stream says before the first piece."""
        raise NotImplementedError

    def piece(self, index: int, piece: Piece) -> list[Choice]:
        """What a piece adds."""
        raise NotImplementedError

    def end(self, index: int, generation: Generation) -> list[Choice]:
        """The end, with the finish reason."""
        raise NotImplementedError

    def whole(self, index: int, pieces: list[Piece], generation: Generation) -> Choice:
        """A choice that is not streamed."""
        raise NotImplementedError

    def chunk(self, choices: list[Choice], **more: Any) -> dict[str, Any]:
        """A part of a stream."""
        return {**self._head, "object": self.chunk_kind, "choices": choices, **more}

    def answer(self, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """A whole answer."""
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}


async def answer(http: HttpRequest, call: Call, reply: Reply) -> Response:
    """All of it at once."""
    pieces: list[list[Piece]] = [[] for _ in call.handles]

    async def gather() -> None:
        async for index, event in call.events():
            if isinstance(event, Piece):
                pieces[index].append(event)

    try:
        await unless_gone(http, gather())
    except Gone:
        return Response(status_code=499)  # which nobody reads
    finally:
        call.close()
    choices = [reply.whole(i, pieces[i], call.generations[i]) for i in range(len(pieces))]
    return JSONResponse(reply.answer(choices, call.usage(reply.choices)))


class EventStream(StreamingResponse):
    """Server-sent events of a call, which is closed however the stream ends."""

    def __init__(self, call: Call, reply: Reply, include_usage: bool):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter for nginx
        super().__init__(_events(call, reply, include_usage), media_type="text/event-stream", headers=headers)
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.close()


async def _events(call: Call, reply: Reply, include_usage: bool) -> AsyncIterator[str]:
    more: dict[str, Any] = {"usage": None} if include_usage else {}
    try:
        for index in range(len(call.handles)):
            for choice in reply.begin(index):
                yield _event(reply.chunk([choice], **more))
        async for index, event in call.events():
            choices = reply.piece(index, event) if isinstance(event, Piece) else reply.end(index, event)
            for choice in choices:
                yield _event(reply.chunk([choice], **more))
    except ApiError as error:  # the status has been sent already
        yield _event(error_object(error.status, str(error), error.code))
        return
    if include_usage:
        yield _event(reply.chunk([], usage=call.usage(reply.choices)))
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
