"""Replicas of the engine behind Ray Serve: `pip install 'dflash-jax[ray]'`, then

    serve run serve.deploy.ray_app:app replicas=2 target=DIR drafter=DIR

Each replica is a process with its own pair and engine. The gateway spreads requests over them, and sends one again
whose replica has died: a request's answer follows from the request alone (its seed included), so nothing is lost.
"""

import asyncio
import dataclasses
import logging
import os
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from dflash_jax.decoding.output import Generation, Piece
from dflash_jax.errors import InputError
from dflash_jax.pair import load
from serve.config import EngineConfig
from serve.engine import Busy, Engine
from serve.requests import Event, Request

TRIES = 10  # of one request, each on a replica that is alive then
PAUSE = 0.5  # seconds before the next try
FIELDS = {field.name for field in dataclasses.fields(Request)}
log = logging.getLogger(__name__)


@serve.deployment
class Replica:
    """One engine. Answers are {"text", "tokens", "finish_reason"}, or {"error", "status"} for a request that is bad."""

    def __init__(self, target: str | None, drafter: str | None, config: EngineConfig):
        self.engine = Engine(load(target, drafter), config).start()

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Run one request, given as the fields of `serve.requests.Request`."""
        loop = asyncio.get_running_loop()
        end: asyncio.Future[Generation] = loop.create_future()

        def settle(event: Generation | Exception) -> None:
            if not end.done():
                end.set_exception(event) if isinstance(event, Exception) else end.set_result(event)

        def deliver(event: Event) -> None:
            if not isinstance(event, Piece):
                loop.call_soon_threadsafe(settle, event)

        try:
            handle = self.engine.submit(_request(body), deliver)
        except InputError as error:
            return {"error": str(error), "status": 400}
        except Busy as error:
            return {"error": str(error), "status": 503}
        try:
            generation = await end
        except asyncio.CancelledError:
            handle.cancel()
            raise
        return {"text": generation.text, "tokens": generation.tokens, "finish_reason": generation.finish_reason}

    def pid(self) -> int:
        """Of the replica's process."""
        return os.getpid()

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica whose engine has failed."""
        if self.engine.error is not None:
            raise RuntimeError(f"the engine has failed: {self.engine.error}")


def _request(body: Any) -> Request:
    if not isinstance(body, dict) or "prompt" not in body:
        raise InputError("the body is not a JSON object with a prompt")
    if strange := sorted(set(body) - FIELDS):
        raise InputError(f"the body has {strange[0]!r}; its fields are {', '.join(sorted(FIELDS))}")
    if isinstance(bias := body.get("logit_bias"), dict):  # JSON has no other keys than texts
        body = body | {"logit_bias": {int(k) if str(k).isdecimal() else k: v for k, v in bias.items()}}
    return Request(**body)


@serve.deployment(max_ongoing_requests=10_000)
class Gateway:
    """Takes requests (POST of a JSON object, or `complete`) and gives them to replicas."""

    def __init__(self, replicas: DeploymentHandle):
        self.replicas = replicas

    async def complete(self, body: Any) -> dict[str, Any]:
        """A replica's answer. A replica that dies on the way costs time only."""
        for left in reversed(range(TRIES)):
            try:
                return await self.replicas.complete.remote(body)
            except RayTaskError:
                raise  # the replica is alive and has said no
            except RayError as error:
                if not left:
                    raise
                log.warning("a replica has gone (%s); its request is sent again", type(error).__name__)
                await asyncio.sleep(PAUSE)
        raise AssertionError

    async def __call__(self, http: HttpRequest) -> Response:
        try:
            body = await http.json()
        except ValueError:
            body = None
        answer = await self.complete(body)
        return JSONResponse(answer, status_code=answer.pop("status", 200))


def app(arguments: dict[str, Any]) -> Any:
    """The application: `replicas` (2), `target`, `drafter`, and whatever else `EngineConfig` takes."""
    given = dict(arguments)
    count, target, drafter = int(given.pop("replicas", 2)), given.pop("target", None), given.pop("drafter", None)
    names = {field.name: field for field in dataclasses.fields(EngineConfig)}
    if strange := sorted(set(given) - set(names)):
        raise InputError(f"an engine has no {strange[0]!r}; it has {', '.join(names)}")
    # On a command line all values are texts.
    values: dict[str, Any] = {k: int(v) if isinstance(v, str) and v.isdecimal() else v for k, v in given.items()}
    config = EngineConfig(**values)
    replica: Any = Replica
    waiting = config.max_requests
    return Gateway.bind(  # pyrefly: ignore[missing-attribute]
        replica.options(num_replicas=count, max_ongoing_requests=waiting).bind(target, drafter, config)
    )
