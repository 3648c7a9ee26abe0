"""The application: which path does what. The engine is made, started and closed by whoever makes the application."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError

from dflash_jax.version import __version__
from serve.api import errors
from serve.api.calls import Call
from serve.api.chat import ChatReply, chat_grammar, render
from serve.api.completions import CompletionReply, Shown
from serve.api.errors import ApiError
from serve.api.gate import Gate
from serve.api.grammars import grammar_of
from serve.api.metrics import Latencies, make_registry
from serve.api.replies import EventStream, Extras, Reply, answer
from serve.api.schemas import Body, ChatBody, CompletionBody
from serve.api.settings import engine_requests, made
from serve.engine import Engine
from serve.requests import Request as EngineRequest

PAGE = Path(__file__).parents[1] / "web" / "index.html"
MAX_BODY_BYTES = 8 * 2**20
# The page has all it needs in itself, and talks to its own server only.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"

LARGE_BYTES = 2**16
_LARGE = ThreadPoolExecutor(1, thread_name_prefix="dflash-large")

B = TypeVar("B", bound=Body)
T = TypeVar("T")


def create_app(
    engine: Engine,
    model: str,
    *,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    reasoning: bool = True,
) -> FastAPI:
    """Serve `engine`, which has been started, under the name `model`; `app.state.cancel` ends all that runs.

    `reasoning`: what a model thinks between <think> and </think> is no part of a chat's content, but has its own.
    """
    app = FastAPI(title="dflash", version=__version__, openapi_url=None)  # OpenAI's documentation is the documentation
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=max_body_bytes)
    errors.install(app)
    routes = _Routes(engine, model, reasoning)
    routes.add_to(app)
    app.state.cancel = routes.cancel
    return app


async def off_loop(size: int, work: Callable[..., T], *args: Any, **options: Any) -> T:
    """Return what `work` returns, which a thread does: those of large bodies do not keep those of others waiting."""
    pool = _LARGE if size > LARGE_BYTES else None
    return await asyncio.get_running_loop().run_in_executor(pool, partial(work, *args, **options))


async def _read(http: Request, kind: type[B], model: str) -> tuple[B, int]:
    """Return the body, checked, and how many bytes it has."""
    text = await http.body()
    try:
        body = await off_loop(len(text), kind.model_validate_json, text)
    except ValidationError as error:
        raise ApiError(400, await off_loop(len(text), errors.describe, error)) from None
    if body.model is not None and body.model != model:
        raise _no_model(body.model, model)
    return body, len(text)


def _no_model(asked: str, model: str) -> ApiError:
    return ApiError(404, f"there is no model {asked[:100]!r}; this server has {model!r}", code="model_not_found")


class _Routes:
    """The paths, and what they share."""

    def __init__(self, engine: Engine, model: str, reasoning: bool):
        self.engine, self.model, self.reasoning = engine, model, reasoning
        self.created = int(time.time())
        self.registry = make_registry(engine)
        self.latencies = Latencies(self.registry)
        self.page = PAGE.read_text(encoding="utf-8")
        self._calls: WeakSet[Call] = WeakSet()  # those that may still run

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/completions", self.complete, methods=["POST"])
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/models/{name:path}", self.one_model)
        app.add_api_route("/health", self.health)
        app.add_api_route("/metrics", self.metrics)
        app.add_api_route("/", self.index)

    def cancel(self) -> None:
        """End every request; those who wait are told that the server stops."""
        for call in list(self._calls):
            call.close()

    async def _start(self, size: int, make: Callable[[], list[EngineRequest]]) -> Call:
        call = Call(self.engine, self.latencies)
        self._calls.add(call)
        await call.start(partial(off_loop, size), make)
        return call

    async def chat(self, http: Request) -> Response:
        body, size = await _read(http, ChatBody, self.model)
        engine, tokenizer = self.engine, self.engine.pair.tokenizer
        most = engine.config.sizes.length - 1
        prompt = await off_loop(size, render, tokenizer, body, most=most, reasoning=self.reasoning)
        call = await self._start(size, lambda: engine_requests(body, [prompt.ids], engine, chat_grammar(body, prompt)))
        return await self._answer(http, body, call, ChatReply(self.model, body, tokenizer, prompt))

    async def complete(self, http: Request) -> Response:
        body, size = await _read(http, CompletionBody, self.model)
        engine, tokenizer, prompts = self.engine, self.engine.pair.tokenizer, body.prompts
        call = await self._start(size, lambda: engine_requests(body, prompts, engine, grammar_of(body)))
        before = [await off_loop(size, _text, tokenizer, p) if body.echo else "" for p in _run(body, call)]
        shown = Shown(made(body), body.n or 1, bool(body.dflash), body.logprobs, bool(body.echo))
        reply = CompletionReply(
            self.model, shown, tokenizer, before, [call.prompt(index) for index in range(len(call.handles))]
        )
        return await self._answer(http, body, call, reply)

    async def _answer(self, http: Request, body: Body, call: Call, reply: Reply) -> Response:
        if not body.stream:
            return await answer(http, call, reply, Extras.of(body))
        return EventStream(call, reply, Extras.of(body))

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        if name != self.model:
            raise _no_model(name, self.model)
        return self._card()

    def _card(self) -> dict[str, Any]:
        config, pair = self.engine.config, self.engine.pair
        facts = {"chat": pair.tokenizer.can_chat, "widths": list(config.widths)}
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "dflash-jax",
            "max_model_len": config.sizes.length,
            "dflash": facts,
        }

    async def health(self) -> Response:
        stats = self.engine.stats
        state = {"status": "ok" if self.engine.alive else "failed", "model": self.model, "version": __version__}
        return JSONResponse(state | {"requests": stats.unfinished}, 200 if self.engine.alive else 503)

    async def metrics(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def index(self) -> Response:
        return HTMLResponse(self.page, headers={"Content-Security-Policy": POLICY})


def _run(body: CompletionBody, call: Call) -> Sequence[str | list[int]]:
    """Return the prompts of a body as they are run, of which some tokens may have been dropped."""
    return [call.prompt(i * made(body)) if body.truncate_prompt_tokens else p for i, p in enumerate(body.prompts)]


def _text(tokenizer: Any, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
