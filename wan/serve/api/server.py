"""The API as an application, and as a server of this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from nabla import InputError
from wan.serve.api import routes_files, routes_server, routes_videos
from wan.serve.api.bounds import BODY_SECONDS, MAX_FIELDS_BYTES, Bounds
from wan.serve.api.connections import HastyProtocol
from wan.serve.api.errors import add_handlers
from wan.serve.api.metrics import Counted
from wan.serve.api.reference import reference_page
from wan.serve.api.schema import MB
from wan.serve.api.service import Service
from wan.serve.hosts import Hosts

# Connections at once, beyond which uvicorn answers 503; processes may mostly open a thousand files.
MOST_CONNECTIONS = 500
# What clients that wait for news are given to go when the server ends.
GRACE_SECONDS = 2
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def make_app(service: Service, hosts: Hosts, body_seconds: float = BODY_SECONDS) -> Callable:
    """The ASGI application over a service."""
    # FastAPI's own pages would have browsers load scripts from elsewhere.
    app = FastAPI(title="Videos with NABLA attention", docs_url=None, redoc_url=None)
    add_handlers(app)
    service.metrics.watch(service.queue.store)

    app.state.service = service
    for routes in (routes_videos, routes_files, routes_server):
        app.include_router(routes.router)

    @app.get("/docs", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()), headers={"Content-Security-Policy": POLICY})

    # A picture in JSON is written in four letters for three bytes.
    most = service.limits.upload_mb * MB * 4 // 3 + MAX_FIELDS_BYTES
    return Counted(Bounds(app, hosts, service.tokens, most, body_seconds), service.metrics)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; port 0 takes a free one. Raises `InputError`."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        # Python adds the address to the system's words, which the message has already.
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else error
        raise InputError(f"port {port} of {host} cannot be served ({reason}); choose another") from None


def url_of(listening: socket.socket) -> str:
    """What a socket is reached by from this machine."""
    host, port = listening.getsockname()[:2]
    own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{own}]:{port}" if ":" in own else f"http://{own}:{port}"


def make_server(app: Callable) -> uvicorn.Server:
    """A server of an application; `run(sockets=[...])` serves until it is interrupted."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=HastyProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # Else whoever asks through this machine could say which address it is.
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )
