"""What reaches the page's server: requests to its own names, from its own pages, for what it offers."""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from nabla import InputError
from wan.observe.console import printable

LOOPBACK = ("localhost", "127.0.0.1", "::1")
API = "/gradio_api/"
FILE = f"{API}file="
# All that the page's own script asks for.
PATHS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon)/?|/(assets|static|svelte)/.*|"
    rf"{API}(startup-events|upload|upload_progress|queue/join|queue/data|cancel|reset|app_id|theme\.css|login_check)/?|"
    rf"{API}((run|heartbeat)/[^/]+|info)/?|{re.escape(FILE)}.*",
    re.DOTALL,
)
# Of a request that is no upload: a prompt and the controls.
MAX_BODY = 1 << 20
# Of a request that uploads, beside the file itself.
MULTIPART_EXTRA = 1 << 20
TAKE_IN_SECONDS = 2
# Who has no connection open that hears of a video for so long has left.
UNHEARD_SECONDS = 15


class Refused(Exception):
    """A request that is not answered. status: of HTTP"""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Presence:
    """Which sessions of browsers have a connection open on which news of their videos come."""

    def __init__(self) -> None:
        # Told on the event loop, asked by the threads that follow jobs.
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    def comes(self, session: str) -> None:
        with self._lock:
            self._open[session] += 1

    def goes(self, session: str) -> None:
        with self._lock:
            self._open[session] -= 1
            if self._open[session] <= 0:
                del self._open[session]

    def is_here(self, session: str | None) -> bool:
        return session in self._open


def split_host(text: str) -> tuple[str, int | None]:
    """Name and port of `name:port`, `[::1]:port` or `name`; raises ValueError for anything else."""
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", text):
        raise ValueError(text)
    parts = urlsplit(f"//{text}")
    return (parts.hostname or "").rstrip("."), parts.port


class Guard:
    """An ASGI application that passes on to another what the page answers to, and refuses the rest in a line.

    app: gradio's; host: the address that is served on; names: further hosts, with or without a port, of which
    `allow` adds more, as a reverse proxy or a public link has them; offered: gives the files that may be fetched
    presence: is told which sessions listen
    held: gives the bytes that uploads hold by now; max_upload, max_held: the most that one and all may be
    """

    def __init__(
        self,
        app: Callable,
        host: str,
        names: Iterable[str],
        offered: Callable[[], Iterable[str]],
        held: Callable[[], int],
        max_upload: int,
        max_held: int,
        presence: Presence,
    ):
        self.app = app
        # 0.0.0.0 and :: mean every address, and are no name that a page is opened by.
        self.own = {*LOOPBACK, host.strip("[]").lower()} - {"0.0.0.0", "::", ""}
        self.names: set[tuple[str, int | None]] = set()
        self.offered, self.held = offered, held
        self.max_upload, self.max_held = max_upload, max_held
        self.presence = presence
        self._token = secrets.token_urlsafe(32)
        # Read and changed on the event loop alone, so it needs no lock.
        self._arriving = 0
        for name in names:
            self.allow(name)

    def allow(self, name: str) -> None:
        """Answer to a further name too; raises `InputError` unless it is one."""
        try:
            self.names.add(split_host(name.lower()))
        except ValueError:
            raise InputError(f"allowed_host {name!r} is not a host; give video.example.org or a name:port") from None

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            headers = self._check(scope)
            size = self._check_body(scope, headers)
        except Refused as refused:
            await _take_in(scope, receive)
            await _refuse(scope, send, refused)
            return
        self._arriving += size
        if session := _heard_by(scope):
            self.presence.comes(session)
        try:
            await self.app(scope, receive, self._with_headers(scope, send))
        finally:
            self._arriving -= size
            if session:
                self.presence.goes(session)

    def _check(self, scope: dict) -> dict[str, str]:
        """The headers of a request that may pass; raises `Refused`."""
        headers: dict[str, str] = {}
        for raw, value in scope["headers"]:
            name = raw.decode("latin-1").lower()
            # Of two, this and what is behind it might each go by another.
            if name in ("host", "origin", "content-length") and name in headers:
                raise Refused(403, f"two headers {name}")
            text = value.decode("latin-1")
            headers[name] = f"{headers[name]}; {text}" if name in headers else text
        host, origin = headers.get("host", ""), headers.get("origin")
        # Else a foreign page could have its own name lead here (DNS rebinding), and be of this page's origin.
        if not self._is_own(host, "http", scope):
            raise Refused(403, f"this page is not served as {host[:100]!r}; see --allowed_host")
        if origin is not None and not self._is_own_origin(origin, scope):
            raise Refused(403, f"requests from {origin[:100]!r} are not taken")
        path = scope["path"]
        # Without an origin come pictures and scripts that a foreign page embeds.
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and path != "/":
            raise Refused(403, "requests from other sites are not taken")
        if scope["type"] != "http" or not PATHS.fullmatch(path):
            raise Refused(404, "there is nothing here")
        if path.startswith(FILE) and unquote(path[len(FILE) :]) not in set(self.offered()):
            raise Refused(403, "this file is not offered")
        return headers

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

    def _check_body(self, scope: dict, headers: dict[str, str]) -> int:
        """The bytes of an upload that may pass, 0 for other requests; raises `Refused`."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return 0
        length = headers.get("content-length", "")
        # Bodies in chunks say no length, and would be read before they are found too large.
        if not re.fullmatch(r"[0-9]{1,15}", length) or "transfer-encoding" in headers:
            raise Refused(411, "a request has to say how long it is")
        if scope["path"].rstrip("/") != f"{API}upload":
            if int(length) > MAX_BODY:
                raise Refused(413, f"the request is larger than {MAX_BODY} bytes")
            return 0
        # In bytes, since for text beyond ASCII compare_digest raises.
        if not secrets.compare_digest(_cookie(headers, _cookie_name(scope)).encode(), self._token.encode()):
            raise Refused(403, "files are taken from the page alone; open it, and with cookies allowed")
        if int(length) > self.max_upload + MULTIPART_EXTRA:
            raise Refused(413, f"the file is larger than {self.max_upload} bytes")
        # Files on their way are not all on the disk, so they count by the length that they say.
        if self.held() + self._arriving + int(length) > self.max_held:
            raise Refused(413, "the page holds as many uploaded files as it may; try again tomorrow")
        return int(length)

    def _with_headers(self, scope: dict, send: Callable) -> Callable:
        """`send` that adds the page's own headers to an answer: who loads the page gets its token."""
        # A page that frames this one could have its visitors click here unseen; an upload is not to be taken for a
        # script.
        added = [(b"x-frame-options", b"DENY"), (b"x-content-type-options", b"nosniff")]
        if scope["path"] == "/" and scope["method"] == "GET":
            cookie = f"{_cookie_name(scope)}={self._token}; Path=/; HttpOnly; SameSite=Strict"
            added.append((b"set-cookie", cookie.encode()))

        async def wrapped(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), *added]}
            await send(message)

        return wrapped


def _cookie_name(scope: dict) -> str:
    # Cookies of a host are those of all its ports.
    return f"wan_page_{(scope.get('server') or ('', 0))[1]}"


def _cookie(headers: dict[str, str], name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _heard_by(scope: dict) -> str | None:
    """The session that hears of its videos by a request, if it is of that kind."""
    path = scope["path"].rstrip("/")
    if path == f"{API}queue/data":
        return parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [None])[0]
    if path.startswith(f"{API}heartbeat/"):
        return path.rpartition("/")[2]
    return None


async def _take_in(scope: dict, receive: Callable) -> None:
    """Read the rest of a small request that is refused: with some unread, its sender may lose the answer."""
    lengths = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
    if scope["type"] != "http" or len(lengths) != 1 or not re.fullmatch(rb"[0-9]{1,7}", lengths[0]):
        return
    if 0 < int(lengths[0]) <= MAX_BODY:
        with suppress(TimeoutError):
            async with asyncio.timeout(TAKE_IN_SECONDS):
                while (await receive()).get("more_body"):
                    pass


async def _refuse(scope: dict, send: Callable, refused: Refused) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = f"{printable(refused)}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    # What comes of a body that is not read would be taken for the next request.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; those that go meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except OSError:
            continue
    return total


class Hearing:
    """Whether anyone hears of a job: not once its session had no connection open for `UNHEARD_SECONDS`."""

    def __init__(self, presence: Presence, session: str | None):
        self._presence, self._session = presence, session
        self._last = time.monotonic()

    def goes_on(self) -> bool:
        if self._presence.is_here(self._session):
            self._last = time.monotonic()
        return time.monotonic() - self._last < UNHEARD_SECONDS
