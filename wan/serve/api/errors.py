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
from wan.serve.api.schema import VideoRequest
from wan.serve.jobs.store import QueueFull, StorageError
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
# What may be at fault of a request; all else that a message begins with is a word of it.
PARAMS = {*VideoRequest.model_fields, "input_reference", "last_image", "after"}
# What pydantic says of a mapping that is not one has the names of classes.
NO_MAPPING = ("model_type", "dict_type", "model_attributes_type")
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


def answer_to(request: Request, error: Exception) -> JSONResponse:
    """The answer for an error, in OpenAI's form."""
    status, message, code, param, headers = _told(request, error)
    return JSONResponse(error_object(status, message, code, param), status, headers)


def add_handlers(app: FastAPI) -> None:
    """Have an application answer every error by `answer_to`."""
    for kind in (ApiError, InputError, QueueFull, StorageError, ValidationError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_to)
    # Starlette raises these again once they are answered, for the log.
    app.add_exception_handler(Exception, answer_to)


def _told(request: Request, error: Exception) -> tuple[int, str, str | None, str | None, dict[str, str]]:
    """Status, message, code, field and headers of the answer for an error."""
    match error:
        case ApiError():
            return error.status, str(error), error.code, error.param, error.headers
        case InputError():
            message, param = in_fields(without_folders(str(error)))
            return 400, message, "invalid_value", param, {}
        case ValidationError() | RequestValidationError():
            message, param = _first_fault(error)
            return 400, message, "invalid_value", param, {}
        case QueueFull():
            return 429, str(error), "queue_full", None, {"Retry-After": str(error.retry_after)}
        case StorageError():
            log.warning("warning: %s", error)
            return 503, str(error), "storage_full", None, {"Retry-After": "60"}
        case HTTPException():
            where = f"{request.method} {request.url.path[:100]}"
            usual = {
                404: f"there is nothing at {where}; /docs lists what is",
                405: f"{where} is not offered; see /docs",
            }
            said = usual.get(error.status_code, str(error.detail))
            return error.status_code, said, None, None, dict(error.headers or {})
        case _:
            return 500, "the server failed; its log says how", "internal_error", None, {}


def in_fields(message: str) -> tuple[str, str | None]:
    """A message about a setting as one about the field of a request that says it, and the field if it is one."""
    first = re.match(r"[a-z_0-9]+", message)
    if first is None:
        return message, None
    field = FIELDS.get(first[0], first[0])
    said = field + message[first.end() :]
    if field == "size":
        said = said.replace("*", "x")
    return said, field if field in PARAMS else None


def _first_fault(error: RequestValidationError | ValidationError) -> tuple[str, str | None]:
    fault = error.errors()[0]
    parts = [str(part) for part in fault["loc"] if part not in ("body", "query", "path")]
    place, param = ".".join(parts), parts[0] if parts else None
    if fault["type"] == "extra_forbidden":
        return f"{place} is not a field that is taken here; see /docs", param
    given = "" if fault["type"] == "missing" else f" {repr(fault.get('input'))[:60]}"
    said = "Input should be an object" if fault["type"] in NO_MAPPING else fault["msg"]
    return f"{place or 'the request'}{given}: {said[:1].lower()}{said[1:]}", param
