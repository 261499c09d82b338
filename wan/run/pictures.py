"""Pictures that videos begin with: whether they can be read, what size of video fits them, what records say of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from nabla import InputError
from wan.config.config_files import read_made_with
from wan.config.inputs import Files, each_file, inputs_of
from wan.config.settings import Settings
from wan.files.picture import check_picture, read_picture
from wan.models.checkpoint import Checkpoint
from wan.run.records import VIDEOS, record_of, recorded_otherwise

log = logging.getLogger("wan")


def check_inputs(first: Settings, layers: Iterable[Mapping[str, Any]]) -> None:
    """Raise `InputError` for a file of the first video, or of layers of single videos, that cannot be read."""
    for path in sorted({path for one in (first.inputs, *map(inputs_of, layers)) for _, path in each_file(one)}):
        check_picture(path)


def fit_to_picture(checkpoint: Checkpoint, settings: Settings) -> Settings:
    """The same with the size of video that fits their picture, if there is one, and a log line if that is another.

    Raises `InputError` if the checkpoint takes no picture or begins with one that is not given, or this one cannot be
    read.
    """
    kind = settings.model.kind
    begins = checkpoint.begins_with_picture(kind)
    if settings.image is None and not begins:
        return settings
    if settings.image is None:
        raise InputError(f"videos of {kind or checkpoint.name} begin with a picture; give one with --image FILE")
    if begins is False:
        raise InputError(
            f"image {settings.image} is not taken by {kind or checkpoint.kind or checkpoint.name}, "
            "which starts from text alone; leave it out"
        )
    picture, asked = check_picture(settings.image), settings.video.size
    size = checkpoint.family.fit_size(checkpoint.layout, picture, asked)
    if size == asked:
        return settings
    said = ("x".join(map(str, one)) for one in (size, picture, asked))
    log.info("size: %s fits the picture, which is %s; %s was asked for", *said)
    return replace(settings, video=replace(settings.video, size=size))


def open_inputs(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a video is made of beside its prompt, read as `generate` takes it, and what a sidecar says of the files."""
    inputs = settings.inputs
    record = {name: record_of(name, given) for name, given in inputs.items()}
    return {name: _opened(given) for name, given in inputs.items()}, record


def _opened(given: Files) -> Any:
    return read_picture(given) if isinstance(given, str) else [read_picture(path) for path in given]


def other_files(sidecar: str, settings: Settings) -> list[str]:
    """A line for each input that is another file now than the video was made of whose sidecar gives the settings."""
    lines = []
    for name in recorded_otherwise(read_made_with(sidecar), settings.inputs):
        kind, given = "video" if name in VIDEOS else "picture", settings.inputs[name]
        is_one = isinstance(given, str)
        other = f"another {kind} than {given} is" if is_one else f"other {kind}s than those of {name} are"
        lines.append(
            f"{sidecar} was made from {other} now, so this video will differ; "
            f"give {'that one' if is_one else 'those'} as --{name} to have it again"
        )
    return lines
