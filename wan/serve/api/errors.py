"""What goes wrong, in OpenAI's form: the statuses and objects that its clients turn into their exceptions."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from nabla import InputError
from wan.observe.console import printable
from wan.serve.jobs.files import StorageError
from wan.serve.jobs.store import QueueFull
from wan.serve.shown import without_folders

log = logging.getLogger("wan")

# What OpenAI calls the statuses; all others below 500 are the first.
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
# Names of settings, and of the fields of a request that say them.
FIELDS = {
    "frame_num": "num_frames",
    "steps": "num_inference_steps",
    "guide_scale": "guidance_scale",
    "shift": "flow_shift",
    "image": "input_reference",
}
MAX_MESSAGE = 2000


class ApiError(Exception):
    """A request that cannot be met. code: a word for programs; param: the field at fault; headers: of the answer"""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})


def error_object(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = KINDS.get(status, "server_error" if status >= 500 else KINDS[400])
    said = printable(message)[:MAX_MESSAGE]
    return {"error": {"message": said, "type": kind, "param": param, "code": code}}


def not_found(job_id: str) -> ApiError:
    return ApiError(404, f"video {job_id[:100]!r} is not here; GET /v1/videos lists yours", "video_not_found", "id")


def add_handlers(app: FastAPI) -> None:
    """Have an application answer every error in OpenAI's form."""

    def answer(status: int, message: str, code: str | None = None, param: str | None = None, **headers: str) -> Any:
        return JSONResponse(error_object(status, message, code, param), status, headers)

    @app.exception_handler(ApiError)
    async def _(_: Request, error: ApiError) -> Any:
        return answer(error.status, str(error), error.code, error.param, **error.headers)

    @app.exception_handler(InputError)
    async def _(_: Request, error: InputError) -> Any:
        message, param = in_fields(without_folders(str(error)))
        return answer(400, message, "invalid_value", param)

    @app.exception_handler(QueueFull)
    async def _(_: Request, error: QueueFull) -> Any:
        return answer(429, str(error), "queue_full", **{"Retry-After": str(error.retry_after)})

    @app.exception_handler(StorageError)
    async def _(_: Request, error: StorageError) -> Any:
        log.warning("warning: %s", error)
        return answer(503, str(error), "storage_full", **{"Retry-After": "60"})

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def _(_: Request, error: RequestValidationError | ValidationError) -> Any:
        message, param = _first_fault(error)
        return answer(400, message, "invalid_value", param)

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Any:
        where = f"{request.method} {request.url.path[:100]}"
        said = {404: f"there is nothing at {where}; /docs lists what is", 405: f"{where} is not offered; see /docs"}
        return answer(error.status_code, said.get(error.status_code, str(error.detail)), **dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> Any:
        # Starlette raises it again once this is sent, for the log.
        return answer(500, "the server failed; its log says how", "internal_error")


def in_fields(message: str) -> tuple[str, str | None]:
    """A message about a setting as one about the field of a request that says it, and the field."""
    first = re.match(r"[a-z_0-9]+", message)
    if first is None:
        return message, None
    field = FIELDS.get(first[0], first[0])
    return field + message[first.end() :], field


def _first_fault(error: RequestValidationError | ValidationError) -> tuple[str, str | None]:
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"] if part not in ("body", "query", "path"))
    if fault["type"] == "extra_forbidden":
        return f"{place} is not a field that is taken here; see /docs", place
    given = "" if fault["type"] == "missing" else f" {repr(fault.get('input'))[:60]}"
    reason = fault["msg"][:1].lower() + fault["msg"][1:]
    return f"{place or 'the request'}{given}: {reason}", place or None
