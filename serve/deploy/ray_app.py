"""Replicas of the server behind Ray Serve: `pip install 'dflash-jax[ray]'`, then

    serve run serve.deploy.ray_app:app replicas=2 target=DIR drafter=DIR

Each replica is a process with its own engine and application. The gateway spreads requests over them, and sends one
again whose replica has died before it has answered.
"""

import asyncio
import dataclasses
import json
import logging
import os
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

import dflash_jax
from serve.api.app import create_app
from serve.api.errors import ApiError, error_object, response
from serve.command import model_name
from serve.config import EngineConfig, resolve
from serve.engine import Engine

TRIES, PAUSE = 20, 0.5  # of one request, and the seconds between them
GONE = "the replica has died; send the request again"
SCOPE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReplicaConfig:
    """What a replica serves: as `dflash_jax.load`, `Engine` and `create_app` take it."""

    engine: EngineConfig
    target: str | None = None
    drafter: str | None = None
    model_name: str | None = None
    api_key: str | None = None


class Replica:
    """One engine and its application."""

    def __init__(self, c: ReplicaConfig):
        pair = dflash_jax.load(c.target, c.drafter, check=partial(resolve, c=c.engine))
        self.engine = Engine(pair, c.engine).start()
        self.app = create_app(self.engine, c.model_name or model_name(c.target), api_key=c.api_key)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The messages by which an ASGI application answers a request."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        request = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            for message in request:
                return message
            return await asyncio.Future()  # when the sender goes away, all of this is cancelled

        task = asyncio.ensure_future(self.app(scope, receive, sent.put))
        task.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
        finally:
            task.cancel()

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica whose engine has failed."""
        if not self.engine.alive:
            raise RuntimeError("the engine has failed")


class Gateway:
    """Passes requests on. `dflash-tries` in an answer's head says how many replicas it took."""

    def __init__(self, replicas: DeploymentHandle):
        self._replicas = replicas.options(stream=True)

    async def __call__(self, http: HttpRequest) -> Response:
        scope = {name: http.scope[name] for name in SCOPE if name in http.scope}
        try:
            tries, head, first, rest = await self._begin(scope, await http.body())
        except ApiError as error:
            return response(error)
        answer = StreamingResponse(_parts(first, rest), status_code=head["status"])
        answer.raw_headers = [*head["headers"], (b"dflash-tries", str(tries).encode())]
        return answer

    async def _begin(self, scope: dict[str, Any], body: bytes) -> tuple[int, Message, Message, AsyncIterator[Message]]:
        """Which try it was, head and first part of the answer, and what follows."""
        for attempt in range(1, TRIES + 1):
            messages = aiter(self._replicas.answer.remote(scope, body))
            try:
                return attempt, await anext(messages), await anext(messages), messages
            except RayTaskError:
                raise  # the replica lives, and has failed
            except RayError as error:
                log.warning("a replica is gone (%s): its request is sent again", type(error).__name__)
                await asyncio.sleep(PAUSE)
        raise ApiError(503, f"no replica has lived to answer, in {TRIES} tries; send the request again later")


async def _parts(first: Message, rest: AsyncIterator[Message]) -> AsyncIterator[bytes]:
    """The body of an answer, which is a stream of events where it has several parts."""
    yield first.get("body", b"")
    try:
        async for message in rest:
            yield message.get("body", b"")
    except RayTaskError:
        raise
    except RayError:  # what was sent cannot be taken back
        yield f"data: {json.dumps(error_object(503, GONE, 'stopped'))}\n\n".encode()


class Options(BaseModel):
    """What `serve run` takes as NAME=VALUE, as `dflash serve` does; `gpus` and `tpus` are those of each replica."""

    model_config = ConfigDict(extra="forbid")

    replicas: int = Field(2, ge=1)
    gpus: int = Field(0, ge=0)
    tpus: int = Field(0, ge=0)
    target: str | None = None
    drafter: str | None = None
    model_name: str | None = None
    api_key: str | None = Field(default_factory=lambda: os.environ.get("DFLASH_API_KEY") or None)
    slots: int = 16
    max_length: int | None = None
    max_requests: int = Field(4096, ge=1)
    logprobs: int = 20
    grammar: bool = True


def app(options: Options) -> serve.Application:
    """The application that `serve run` starts."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    engine = EngineConfig(**options.model_dump(include=names))
    pair = options.model_dump(include={"target", "drafter", "model_name", "api_key"})
    needs = {"num_gpus": options.gpus} | ({"resources": {"TPU": options.tpus}} if options.tpus else {})
    return deploy(ReplicaConfig(engine, **pair), options.replicas, needs)


def deploy(config: ReplicaConfig, replicas: int, needs: dict[str, Any] | None = None) -> serve.Application:
    """The application of so many replicas; `needs` are Ray's options of an actor, such as `num_gpus`."""
    waiting = config.engine.max_requests
    many = serve.deployment(Replica).options(
        num_replicas=replicas, max_ongoing_requests=waiting, ray_actor_options=needs or {}
    )
    gateway = serve.deployment(Gateway).options(max_ongoing_requests=replicas * waiting)
    return gateway.bind(many.bind(config))
