"""What is turned away before it is read: a wrong key, a body that is too long, a body that is not JSON."""

import hmac
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import ApiError, response


class Gate:
    """Middleware in front of all paths. The key is asked for under /v1/, where models are used."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int):
        self.app, self.limit = app, max_body_bytes
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._look_at(scope)
        except ApiError as error:
            await response(error)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:  # sent in chunks, without a length
                raise self._too_long(f"more than {self.limit}")
            return message

        await self.app(scope, counted, send)

    def _look_at(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._authorization is not None and scope["path"].startswith("/v1"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._authorization):
                what = "the API key is wrong" if given else "there is no API key"
                raise ApiError(401, f"{what}; send it as `Authorization: Bearer KEY`", code="invalid_api_key")
        if int(headers.get(b"content-length", 0)) > self.limit:
            raise self._too_long(headers[b"content-length"].decode())
        # Also keeps pages of other origins away: a browser asks before it sends them JSON.
        kind = headers.get(b"content-type", b"nothing").decode("latin-1").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise ApiError(415, f"the body's Content-Type is {kind}; send JSON, with Content-Type: application/json")

    def _too_long(self, length: Any) -> ApiError:
        return ApiError(413, f"the body has {length} bytes; this server takes {self.limit}", code="body_too_long")
