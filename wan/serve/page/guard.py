"""What reaches the page's server: requests to its own names, from its own pages, for what it offers."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from wan.observe.console import printable
from wan.serve.hosts import Hosts, Refused, answer, read_headers, take_in

API = "/gradio_api/"
FILE = f"{API}file="
# All that the page's own script asks for.
PATHS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon)/?|/(assets|static|svelte)/.*|"
    rf"{API}(startup-events|upload|upload_progress|queue/join|queue/data|cancel|reset|app_id|theme\.css|login_check)/?|"
    rf"{API}((run|heartbeat)/[^/]+|info)/?|{re.escape(FILE)}.*|/jobs/[^/]+/[^/]+",
    re.DOTALL,
)
# Of a request that is no upload: a prompt and the controls.
MAX_BODY = 1 << 20
# Of a request that uploads, beside the file itself.
MULTIPART_EXTRA = 1 << 20


class Guard:
    """An ASGI application that passes on to another what the page answers to, and refuses the rest in a line.

    app: gradio's; host, names: as of `Hosts`; offered: gives the files that may be fetched
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
    ):
        self.app = app
        self.hosts = Hosts(host, names)
        self.offered, self.held = offered, held
        self.max_upload, self.max_held = max_upload, max_held
        self._token = secrets.token_urlsafe(32)
        # Read and changed on the event loop alone, so it needs no lock.
        self._arriving = 0

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            headers = self._check(scope)
            size = self._check_body(scope, headers)
        except Refused as refused:
            await take_in(scope, receive)
            body = f"{printable(refused)}\n".encode()
            await answer(scope, send, refused.status, "text/plain; charset=utf-8", body)
            return
        self._arriving += size
        try:
            await self.app(scope, receive, self._with_headers(scope, send))
        finally:
            self._arriving -= size

    def _check(self, scope: dict) -> dict[str, str]:
        """The headers of a request that may pass; raises `Refused`."""
        headers, path = read_headers(scope), scope["path"]
        self.hosts.check(scope, headers)
        if scope["type"] != "http" or not PATHS.fullmatch(path):
            raise Refused(404, "there is nothing here")
        if path.startswith(FILE) and unquote(path[len(FILE) :]) not in set(self.offered()):
            raise Refused(403, "this file is not offered")
        return headers

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


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; those that go meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except OSError:
            continue
    return total
