"""What a video is made of beside a prompt, as it is given in Python, read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from nabla import InputError
from wan.config.inputs import INPUTS
from wan.files.picture import picture_of
from wan.files.source_video import mask_of, video_of
from wan.models.family import MediaInputs


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
        return tuple(picture_of(one, name) for one in value)
    if name == "src_video":
        return video_of(value)
    return mask_of(value) if name == "src_mask" else picture_of(value, name)


def check_given(given: Collection[str], taken: MediaInputs) -> None:
    """Raise `InputError` for inputs, by their names, that are not taken, and for one that is required and missing."""
    for name in sorted(taken.required):
        if name not in given:
            raise InputError(f"{name} is missing: this checkpoint's videos are made of one; give it")
    for name in sorted(given):
        if name not in taken.taken:
            takes = " and ".join(sorted(taken.taken))
            raise InputError(f"{name} is not taken by this checkpoint, which takes {takes}; leave it out")
