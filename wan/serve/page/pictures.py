"""Pictures that visitors add for videos to begin or end with. Files of users are data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nabla import InputError
from wan.config.inputs import each_file, inputs_of
from wan.config.settings import Settings
from wan.files.picture import check_picture, read_picture
from wan.models.checkpoint import Checkpoint
from wan.models.registry import FAMILIES
from wan.run.records import recorded_otherwise

# A photograph of as many pixels as are taken is smaller, and pictures without loss need not be that large.
MAX_PICTURE_BYTES = 64 << 20
# What a video may do with one, by its name in the settings. The page takes no other files that videos are made of.
PICTURES = {"image": "Begin", "last_image": "End"}
# Of such a picture, as the page shows it.
THUMBNAIL = 512, 512


def picture_notes(sidecar: Mapping[str, Any], made_with: Mapping[str, Any], settings: Settings) -> list[str]:
    """A line for each file that a recorded video was made of and that is not in the settings of the page."""
    named = inputs_of(sidecar)
    others = recorded_otherwise(made_with, settings.inputs)
    notes = []
    for name, given in named.items():
        files = ", ".join(Path(path).name for _, path in each_file({name: given}))
        if name not in PICTURES:
            notes.append(f"the video was made of {name} {files}, which this page does not take")
        elif name not in settings.inputs or name in others or name not in made_with:
            does = {"image": "began", "last_image": "ended"}[name]
            notes.append(f"the video {does} with the picture {files}, which is not here; add it")
    return notes


def pictures_taken(settings: Settings) -> frozenset[str]:
    """Those of `PICTURES` that a video of these settings may have; from the hub of a kind that the settings name."""
    kind = settings.model.kind
    if Path(settings.checkpoint).expanduser().is_dir():
        checkpoint = Checkpoint.open(settings.checkpoint)
        return frozenset(PICTURES) & checkpoint.family.inputs_of(checkpoint.layout, kind).taken
    return frozenset(name for family in FAMILIES for name in family.inputs_of(None, kind).taken if name in PICTURES)


def with_picture(settings: Settings, name: str, upload: Path) -> tuple[Settings, np.ndarray]:
    """Settings of which an uploaded picture is the one of a name, and what the page shows of it.

    A size that was exact for another picture's form is so no more. Raises as `thumbnail_of` does.
    """
    thumbnail = thumbnail_of(upload)
    video, (width, height) = settings.video, check_picture(upload)
    # Of sides that were rounded to whole multiples.
    ratio = (width / height) / (video.size[0] / video.size[1])
    slack = 1 + 2 * max(video.geometry.multiples) / min(video.size)
    if video.exact_size and name == "image" and not 1 / slack < ratio < slack:
        settings = replace(settings, video=replace(video, exact_size=False))
    return replace(settings, **{name: str(upload.absolute())}), thumbnail


def thumbnail_of(upload: Path) -> np.ndarray:
    """An uploaded picture as the page shows it, (height, width, 3) uint8, once it was read as for a video.

    Raises `InputError` for a file that is no picture or too large.
    """
    if upload.stat().st_size > MAX_PICTURE_BYTES:
        raise InputError(f"{upload.name} is larger than {MAX_PICTURE_BYTES >> 20} MB; save it smaller")
    try:
        picture = Image.fromarray(read_picture(upload))
    except InputError as error:
        # Visitors see the file's name, not the server's temporary folder.
        raise InputError(str(error).replace(str(upload), upload.name)) from None
    picture.thumbnail(THUMBNAIL)
    return np.asarray(picture)
