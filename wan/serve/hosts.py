"""Which requests reach a server at all: those to its own names, and of those from web pages those from its own."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from nabla import InputError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# What stands once in a request: of two, a server and what is behind it might each go by another.
ONCE = ("host", "origin", "content-length", "authorization")
# Of a request that is refused, what is mostly read all the same, and for how long.
MAX_TAKEN_IN = 1 << 20
TAKE_IN_SECONDS = 2


class Refused(Exception):
    """A request that is not answered. status: of HTTP"""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def split_host(text: str) -> tuple[str, int | None]:
    """Name and port of `name:port`, `[::1]:port` or `name`; raises ValueError for anything else."""
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", text):
        raise ValueError(text)
    parts = urlsplit(f"//{text}")
    return (parts.hostname or "").rstrip("."), parts.port


def read_headers(scope: dict) -> dict[str, str]:
    """The headers of a request by their names in small letters; raises `Refused` if one of `ONCE` stands twice."""
    headers: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name, text = raw.decode("latin-1").lower(), value.decode("latin-1")
        if name in ONCE and name in headers:
            raise Refused(403, f"two headers {name}")
        headers[name] = f"{headers[name]}; {text}" if name in headers else text
    return headers


class Hosts:
    """The names that a server is reached by.

    host: the address that is served on; names: further ones, with or without a port, of which `allow` adds more, as a
    reverse proxy or a public link has them
    """

    def __init__(self, host: str, names: Iterable[str] = ()):
        # 0.0.0.0 and :: mean every address, and are no name that a server is asked by.
        self.own = {*LOOPBACK, host.strip("[]").lower()} - {"0.0.0.0", "::", ""}
        self.names: set[tuple[str, int | None]] = set()
        for name in names:
            self.allow(name)

    def allow(self, name: str) -> None:
        """Answer to a further name too; raises `InputError` unless it is one."""
        try:
            self.names.add(split_host(name.lower()))
        except ValueError:
            raise InputError(f"allowed_host {name!r} is not a host; give video.example.org or a name:port") from None

    def check(self, scope: dict, headers: dict[str, str]) -> None:
        """Raise `Refused` for a request to another name, and for one that a page of elsewhere sends."""
        host, origin = headers.get("host", ""), headers.get("origin")
        # Else a foreign page could have its own name lead here (DNS rebinding), and be of this server's origin.
        if not self._is_own(host, "http", scope):
            raise Refused(403, f"nothing is served here as {host[:100]!r}; see --allowed_host")
        if origin is not None and not self._is_own_origin(origin, scope):
            raise Refused(403, f"requests from {origin[:100]!r} are not taken")
        # Without an origin come pictures and scripts that a foreign page embeds.
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and scope["path"] != "/":
            raise Refused(403, "requests from other sites are not taken")

    def _is_own(self, netloc: str, scheme: str, scope: dict) -> bool:
        try:
            name, port = split_host(netloc.lower())
        except ValueError:
            return False
        if (name, None) in self.names or (name, port) in self.names:
            return True
        here, here_port = scope.get("server") or ("", None)
        # This server speaks no TLS: an https origin can only be a proxy's, which is among the allowed names.
        return scheme == "http" and name in self.own | {here} and (port or 80) == here_port

    def _is_own_origin(self, origin: str, scope: dict) -> bool:
        scheme, _, netloc = origin.partition("://")
        return scheme in ("http", "https") and self._is_own(netloc, scheme, scope)


async def take_in(scope: dict, receive: Callable, most: int = MAX_TAKEN_IN) -> None:
    """Read the rest of a request that is refused, if it is of up to `most` bytes, and forget it.

    With some unread, its sender may lose the answer.
    """
    lengths = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
    if scope["type"] != "http" or len(lengths) != 1 or not re.fullmatch(rb"[0-9]{1,15}", lengths[0]):
        return
    if 0 < int(lengths[0]) <= most:
        with suppress(TimeoutError):
            async with asyncio.timeout(TAKE_IN_SECONDS):
                while (await receive()).get("more_body"):
                    pass


async def answer(
    scope: dict, send: Callable, status: int, kind: str, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Send one whole answer to a request of which not all may have been read, and end the connection."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    said = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    # What comes of a body that is not read would be taken for the next request.
    every = [*said, (b"connection", b"close"), *headers]
    await send({"type": "http.response.start", "status": status, "headers": every})
    await send({"type": "http.response.body", "body": body})
