"""What a request carries: fields and pictures, as JSON or as a form. Nothing that it names is opened."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import Request
from starlette.datastructures import FormData, UploadFile

from nabla import InputError
from wan.files.plain_data import parse_json
from wan.serve.api.errors import ApiError

# Fields that are pictures, and their settings.
PICTURES = {"input_reference": "image", "last_image": "last_image"}
# Of a form, where nothing is a number or a mapping: fields that may be written as JSON.
AS_JSON = ("lora", "extra_params", *PICTURES)
MOST_FIELDS, MOST_DEEP = 200, 8
MAX_FIELD_BYTES = 1 << 20
DATA_URL = re.compile(r"data:image/[a-z.+-]{1,40};base64,(.*)", re.DOTALL)


class Body(NamedTuple):
    """fields: but for pictures; pictures: what was sent, by the names of their settings"""

    fields: dict[str, Any]
    pictures: dict[str, bytes]

    def digest(self, path: str) -> str:
        """What tells this request, at a path, from others."""
        pictures = {name: hashlib.sha256(content).hexdigest() for name, content in self.pictures.items()}
        return hashlib.sha256(json.dumps([path, self.fields, pictures], sort_keys=True).encode()).hexdigest()


async def read_body(request: Request) -> Body:
    """What a request carries. Raises `ApiError` and `InputError` for what cannot be read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        fields = _json(await request.body(), "the request")
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with request.form(max_files=4, max_fields=MOST_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
            fields = await _fields_of(form)
    else:
        raise ApiError(415, f"content-type {kind[:60]!r} is not read; send JSON, or a form", "unsupported_media_type")
    if not isinstance(fields, dict):
        raise InputError("the request is not an object of fields")
    pictures = {name: given for name in PICTURES if (given := fields.pop(name, None)) is not None}
    return Body(fields, {PICTURES[name]: _picture(name, given) for name, given in pictures.items()})


async def _fields_of(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    names: set[str] = set()
    for name, value in form.multi_items():
        # As in JSON: one of two values would be passed over.
        if name in names and not name.endswith("[]"):
            raise InputError(f"{name[:60]} stands twice in the form; send it once")
        names.add(name)
        if isinstance(value, UploadFile):
            if name not in PICTURES:
                raise InputError(f"{name[:60]} is a file; files are taken as {' or '.join(PICTURES)}")
            fields[name] = await value.read()
        elif name in AS_JSON and value.lstrip()[:1] in ("{", "["):
            fields[name] = _json(value, name)
        else:
            _put(fields, name, value)
    return fields


def _put(fields: dict[str, Any], name: str, value: str) -> None:
    """Put a value of a form where its name says, as `extra_params[cache][kind]`, by which OpenAI's client writes it."""
    first, *inner = re.findall(r"[^\[\]]+|(?<=\[)(?=\])", name) or [name]
    if not inner:
        fields[first] = value
        return
    if len(inner) > MOST_DEEP:
        raise InputError(f"{name[:60]} is nested too deeply")
    place: Any = fields
    for key, following in zip([first, *inner], inner):
        new: Any = [] if following == "" else {}
        if not isinstance(place, dict) or not isinstance(place.setdefault(key, new), type(new)):
            raise InputError(f"{name[:60]} does not fit the fields before it; send {first} as JSON")
        place = place[key]
    if isinstance(place, list):
        place.append(_plain(value))
    else:
        place[inner[-1]] = _plain(value)


def _plain(text: str) -> Any:
    """A number, true or false where a text is one; within mappings nothing else says which is meant."""
    try:
        value = parse_json(text)
    except ValueError:
        return text
    return value if isinstance(value, (int, float)) else text


def _json(text: str | bytes, what: str) -> Any:
    try:
        return parse_json(text if isinstance(text, str) else text.decode())
    except ValueError as error:
        raise InputError(f"{what} is not JSON that can be read: {error}") from None


def _picture(name: str, given: Any) -> bytes:
    """What is in a picture: a file, or a data URL alone or as `image_url`; no other URL is opened, and no path."""
    if isinstance(given, bytes):
        return given
    if isinstance(given, Mapping) and list(given) == ["image_url"]:
        given = given["image_url"]
    match = DATA_URL.fullmatch(given) if isinstance(given, str) else None
    if match is None:
        raise InputError(
            f"{name} is neither a file nor a data URL (data:image/png;base64,...); send the picture itself, since "
            "nothing is fetched and no path is opened"
        )
    try:
        return base64.b64decode(match[1], validate=True)
    except binascii.Error as error:
        raise InputError(f"{name} is not base64 ({error})") from None
