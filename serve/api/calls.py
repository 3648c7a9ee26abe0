"""The engine's requests behind one HTTP request: from its thread into the event loop, and gone when the sender is."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Request as HttpRequest

from dflash_jax.decoding.output import Generation, Piece
from serve.api.errors import ApiError
from serve.api.metrics import Latencies
from serve.engine import Engine
from serve.requests import Event, Handle, Request


class Gone(Exception):
    """The sender does not wait any more."""


class Call:
    """Several requests and their events, in the order in which these come."""

    def __init__(self, engine: Engine, latencies: Latencies):
        self._engine, self._latencies = engine, latencies
        self.handles: list[Handle] = []
        self.generations: dict[int, Generation] = {}
        self._made: Counter[int] = Counter()  # tokens so far
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._closed = False

    async def start(self, in_thread: Callable[..., Awaitable[None]], make: Callable[[], list[Request]]) -> None:
        """Submit what `make` gives, all in a thread. Raises what it and `submit` raise; nothing is left then."""
        try:
            await in_thread(self._submit, make)
        except BaseException:
            self.close()
            raise

    def _submit(self, make: Callable[[], list[Request]]) -> None:
        for index, request in enumerate(make()):
            try:
                handle = self._engine.submit(request, self._deliver_to(index))
            except RuntimeError as error:
                if self._engine.alive:
                    raise
                raise ApiError(503, "the engine has stopped; start the server again") from error
            self.handles.append(handle)
            if self._closed:  # nobody has waited for this; `close` may have been too early to see the handle
                handle.cancel()

    def _deliver_to(self, index: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:  # in the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever would listen
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return deliver

    def close(self) -> None:
        """Cancel what has not ended; everything that it holds in the engine is free soon after."""
        self._closed = True
        for index, handle in enumerate(self.handles):
            if index not in self.generations:
                handle.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Piece | Generation]]:
        """(which request, its next piece), and at the end of each its generation. ApiError where the engine fails."""
        while len(self.generations) < len(self.handles):
            index, event = await self._events.get()
            if isinstance(event, Exception):
                raise ApiError(500, "the engine has failed; its log says more") from event
            if isinstance(event, Generation):
                if event.finish_reason == "cancelled":
                    raise ApiError(
                        503, "the server is stopping; send the request again, to another one", code="stopped"
                    )
                self.generations[index] = event
                self._latencies.observe(self.handles[index], len(event.tokens))
            else:
                self._made[index] += len(event.tokens)
            yield index, event

    async def finish(self) -> None:
        """Wait for all generations."""
        async for _ in self.events():
            pass

    def prompt(self, index: int) -> list[int]:
        """Return the ids of a request's prompt."""
        return [token for token in self.handles[index].request.prompt if isinstance(token, int)]

    def usage(self, choices: int, running: bool = False) -> dict[str, Any]:
        """Return OpenAI's `usage`, with `choices` requests for each prompt: of all that has ended, or of all so far."""
        if running:
            prompt = sum(len(handle.request.prompt) for handle in self.handles[::choices])
            made = sum(self._made.values())
            return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        ended = [(i, h.usage, self.generations[i]) for i, h in enumerate(self.handles) if i in self.generations]
        took = [(i, usage, generation) for i, usage, generation in ended if usage is not None]
        firsts = [usage for i, usage, _ in took if i % choices == 0]  # a prompt counts once
        prompt = sum(usage.prompt_tokens for usage in firsts)
        completion = sum(len(generation.tokens) for _, _, generation in took)
        accepted = sum(usage.accepted_tokens for _, usage, _ in took)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(usage.drafted_tokens for _, usage, _ in took) - accepted,
            },
        }


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, None]) -> None:
    """Do the work. `Gone` as soon as the sender has closed the connection."""
    tasks = asyncio.create_task(work), asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Gone
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
