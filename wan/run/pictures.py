"""Pictures that videos begin with: whether they can be read, what size of video fits them, what records say of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nabla import InputError
from wan.config.checks import absolute_path
from wan.config.config_files import read_made_with
from wan.config.settings import Settings
from wan.files.picture import check_picture, picture_hash, read_picture
from wan.models.checkpoint import Checkpoint

log = logging.getLogger("wan")


def check_pictures(first: Settings, layers: Iterable[Mapping[str, Any]]) -> None:
    """Raise `InputError` for a picture of the first video, or of layers of single videos, that cannot be read."""
    named = {absolute_path("image", layer["image"]) for layer in layers if layer.get("image") is not None}
    for path in sorted(named | ({first.image} if first.image is not None else set())):
        check_picture(path)


def fit_to_picture(checkpoint: Checkpoint, settings: Settings) -> Settings:
    """The same with the size of video that fits their picture, if there is one, and a log line if that is another.

    Raises `InputError` if the checkpoint takes no picture or begins with one that is not given, or this one cannot be
    read.
    """
    family, kind = checkpoint.family, settings.model.kind
    begins = checkpoint.begins_with_picture(kind)
    if settings.image is None and not begins:
        return settings
    if settings.image is None:
        raise InputError(f"videos of {kind or checkpoint.name} begin with a picture; give one with --image FILE")
    if family.fit_picture is None or begins is False:
        own = family.name if family.fit_picture is None else checkpoint.name
        raise InputError(
            f"image {settings.image} is not taken by {kind or own}, which starts from text alone; leave it out"
        )
    picture, asked = check_picture(settings.image), settings.video.size
    size = family.fit_picture(picture, asked)
    if size == asked:
        return settings
    said = ("x".join(map(str, one)) for one in (size, picture, asked))
    log.info("size: %s fits the picture, which is %s; %s was asked for", *said)
    return replace(settings, video=replace(settings.video, size=size))


def open_picture(settings: Settings) -> tuple[np.ndarray | None, dict[str, Any]]:
    """The picture of settings, (height, width, 3) uint8, and what a sidecar says of it; None and nothing without."""
    if settings.image is None:
        return None, {}
    digest = picture_hash(settings.image)
    return read_picture(settings.image), {"image": {"name": Path(settings.image).name, "sha256": digest}}


def other_picture(sidecar: str, settings: Settings) -> str | None:
    """A line if a file of settings is the sidecar of a video that began with another picture than this one will."""
    record = read_made_with(sidecar).get("image")
    digest = record.get("sha256") if isinstance(record, dict) else None
    if digest is None or settings.image is None or picture_hash(settings.image) == digest:
        return None
    return (
        f"{sidecar} was made from another picture than {settings.image} is now, so this video will differ; "
        "give that one as --image to have it again"
    )
