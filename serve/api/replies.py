"""Answers from generations: whole, or as a stream of server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dflash_jax.decoding.output import Generation, Piece
from dflash_jax.text import Tokenizer
from serve.api.calls import Call, Gone, unless_gone
from serve.api.errors import ApiError, error_object
from serve.api.probabilities import prompt_logprobs
from serve.api.schemas import Body, StreamOptions

Choice = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Extras:
    """What an answer tells beside its text."""

    usage: bool = False  # at the end of a stream
    running_usage: bool = False  # and in every chunk of it
    token_ids: bool = False  # of the prompt and of what was made
    prompt_logprobs: int | None = None  # how many likely tokens beside each of the prompt's

    @classmethod
    def of(cls, body: Body) -> "Extras":
        options = body.stream_options or StreamOptions()
        running = bool(options.continuous_usage_stats)
        return cls(options.include_usage or running, running, bool(body.return_token_ids), body.prompt_logprobs)


class Reply:
    """One answer; how its choices look is up to the subclass. All methods get the choice's index."""

    kind = chunk_kind = ""  # the `object` of a whole answer, and of a part
    prefix = ""  # of its id

    def __init__(self, model: str, choices: int, tokenizer: Tokenizer):
        """`choices` are made for each prompt."""
        self.choices, self.tokenizer = choices, tokenizer
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

    def kept(self, generations: Mapping[int, Generation]) -> list[int]:
        """Return which of all choices are shown, in order."""
        return sorted(generations)

    def chunk(self, choices: list[Choice], **more: Any) -> dict[str, Any]:
        """A part of a stream."""
        return {**self._head, "object": self.chunk_kind, "choices": choices, **more}

    def answer(self, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """A whole answer."""
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}


async def answer(http: HttpRequest, call: Call, reply: Reply, extras: Extras) -> Response:
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
    scored = any(_scored(generation) for generation in call.generations.values())
    return await _told(scored, partial(_whole, call, reply, extras, pieces))


def _whole(call: Call, reply: Reply, extras: Extras, pieces: list[list[Piece]]) -> Response:
    choices = []
    for shown, index in enumerate(reply.kept(call.generations)):
        ids = {"token_ids": call.generations[index].tokens} if extras.token_ids else {}
        told = {"index": shown, **ids, **_of_prompt(call, reply, index, extras)}
        choices.append(reply.whole(index, pieces[index], call.generations[index]) | told)
    more = _of_prompt(call, reply, 0, extras)
    return JSONResponse(reply.answer(choices, call.usage(reply.choices)) | more)


def _scored(event: Piece | Generation) -> bool:
    """Return whether log-probabilities of a prompt come along."""
    return event.prompt_logprobs is not None


async def _told(scored: bool, work: Callable[[], T]) -> T:
    """Return what `work` returns; a thread does it where prompts are `scored`, of which there is much to tell."""
    return await asyncio.to_thread(work) if scored else work()


def _of_prompt(call: Call, reply: Reply, index: int, extras: Extras) -> dict[str, Any]:
    """Return what is told of a choice's prompt; vLLM does so in a completion's choices, and beside those of a chat."""
    ids, told = call.prompt(index), {}
    if extras.token_ids:
        told["prompt_token_ids"] = ids
    if extras.prompt_logprobs is not None:
        found = call.generations[index].prompt_logprobs or ()
        told["prompt_logprobs"] = prompt_logprobs(reply.tokenizer, ids, found, extras.prompt_logprobs)
    return told


class EventStream(StreamingResponse):
    """Server-sent events of a call, which is closed however the stream ends."""

    def __init__(self, call: Call, reply: Reply, extras: Extras):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter for nginx
        super().__init__(_events(call, reply, extras), media_type="text/event-stream", headers=headers)
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.close()


async def _events(call: Call, reply: Reply, extras: Extras) -> AsyncIterator[str]:
    ids: list[list[int]] = [[] for _ in call.handles]  # that no chunk has told yet

    firsts = [_of_prompt(call, reply, index, extras) for index in range(len(call.handles))]

    def chunks(index: int, choices: list[Choice]) -> Iterator[str]:
        for choice in choices:
            more, firsts[index] = firsts[index], {}
            told = {"token_ids": ids[index], **more} if extras.token_ids else {}
            ids[index] = []
            if extras.usage:
                more = more | {"usage": call.usage(reply.choices, running=True) if extras.running_usage else None}
            yield _event(reply.chunk([choice | told], **more))

    try:
        for index in range(len(call.handles)):
            for chunk in chunks(index, reply.begin(index)):
                yield chunk
        async for index, event in call.events():
            if isinstance(event, Piece):
                ids[index] += event.tokens
            told = partial(reply.piece, index, event) if isinstance(event, Piece) else partial(reply.end, index, event)
            for chunk in chunks(index, await _told(_scored(event), told)):
                yield chunk
    except ApiError as error:  # the status has been sent already
        yield _event(error_object(error.status, str(error), error.code))
        return
    if extras.usage:
        yield _event(reply.chunk([], usage=call.usage(reply.choices)))
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
