"""What a video is made of beside a prompt, as it is given in Python, read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nabla import InputError
from wan.config.inputs import INPUTS
from wan.files.picture import picture_of


def read_inputs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `VideoRequest` of inputs by their names, None for those that are not given.

    Raises `InputError` for a name that is none of `INPUTS`, and for what cannot be read.
    """
    if unknown := given.keys() - set(INPUTS):
        raise InputError(f"{min(unknown)!r} is no input of a video; use {', '.join(INPUTS)}")
    return {name: _read(name, value) for name, value in given.items() if value is not None}


def _read(name: str, value: Any) -> Any:
    if name == "src_ref_images":
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            raise InputError(f"src_ref_images {value!r} is no list of pictures; put even one in brackets")
        return tuple(picture_of(one) for one in value)
    return picture_of(value)
