"""What a request may be before anything of it is looked at: to whom it goes, whose it is, how large, how slow."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from wan.serve.api.access import Tokens
from wan.serve.api.errors import ApiError, error_object
from wan.serve.hosts import Hosts, Refused, answer, read_headers, take_in

# What is the same for everybody, and needs no token.
PUBLIC = ("/", "/health", "/docs", "/openapi.json")
# Of a request, beside the files that it brings.
MAX_FIELDS_BYTES = 1 << 20
BODY_SECONDS = 60.0
# Requests of the largest size that may be on their way at once.
MOST_ARRIVING = 16


class Bounds:
    """An ASGI application that passes on to another what may pass, and answers the rest with an error object.

    max_body: bytes of a request; seconds: that its body may take to come
    The owner of a request stands in its state.
    """

    def __init__(
        self,
        app: Callable,
        hosts: Hosts,
        tokens: Tokens,
        max_body: int,
        seconds: float = BODY_SECONDS,
    ):
        self.app, self.hosts, self.tokens = app, hosts, tokens
        self.max_body, self.seconds = max_body, seconds
        # Read and changed on the event loop alone, so it needs no lock.
        self._arriving = 0

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            size = self._check(scope)
        except (ApiError, Refused) as error:
            # Clients that sent somewhat too much should hear so.
            await take_in(scope, receive, 4 * self.max_body)
            code, headers = getattr(error, "code", "not_allowed"), getattr(error, "headers", {})
            body = json.dumps(error_object(error.status, str(error), code)).encode()
            sent = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
            await answer(scope, send, error.status, "application/json", body, sent)
            return
        self._arriving += size
        try:
            await self.app(scope, _in_time(receive, self.seconds), _with_headers(send))
        finally:
            self._arriving -= size

    def _check(self, scope: dict) -> int:
        """The bytes of a request that may pass; raises `Refused` and `ApiError`."""
        headers = read_headers(scope)
        self.hosts.check(scope, headers)
        if scope["type"] != "http":
            raise ApiError(404, "there is nothing here", "not_found")
        owner = "" if scope["path"] in PUBLIC else self.tokens.owner(headers.get("authorization"))
        scope.setdefault("state", {})["owner"] = owner
        if scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE"):
            return 0
        length = headers.get("content-length", "")
        # Bodies in chunks say no length, and would be read before they are found too large.
        if not re.fullmatch(r"[0-9]{1,15}", length) or "transfer-encoding" in headers:
            raise ApiError(411, "a request has to say how long it is, in Content-Length", "length_required")
        if int(length) > self.max_body:
            most = self.max_body >> 20
            raise ApiError(413, f"the request has {int(length)} bytes; the most is {most} MB", "request_too_large")
        if self._arriving + int(length) > MOST_ARRIVING * self.max_body:
            raise ApiError(429, "too much is being sent at once; try again", "busy", headers={"Retry-After": "5"})
        return int(length)


def _in_time(receive: Callable, seconds: float) -> Callable:
    """`receive` that raises `ApiError` if a body has not come whole by some seconds from now."""
    until, is_whole = asyncio.get_running_loop().time() + seconds, False

    async def wrapped() -> dict[str, Any]:
        nonlocal is_whole
        if is_whole:
            # From here on it waits for the client to go.
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            # The rest of it would be taken for the next request.
            gone = {"Connection": "close"}
            raise ApiError(408, f"the request took more than {seconds:g} s to come", "too_slow", None, gone) from None
        is_whole = not message.get("more_body", False)
        return message

    return wrapped


def _with_headers(send: Callable) -> Callable:
    """`send` that has browsers neither guess what a file is, nor show it within another site."""
    added = [(b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"), (b"cache-control", b"no-store")]

    async def wrapped(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", ()), *added]}
        await send(message)

    return wrapped
