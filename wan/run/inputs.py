"""What videos are made of beside prompts: whether it can be read and is taken, what size of video fits it."""

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

# What a video without one of these lacks, as a sentence goes on.
LACKS = {"image": "begin with a picture", "last_image": "end with a picture"}


def check_inputs(first: Settings, layers: Iterable[Mapping[str, Any]]) -> None:
    """Raise `InputError` for a file of the first video, or of layers of single videos, that cannot be read."""
    for name, path in sorted({file for one in (first.inputs, *map(inputs_of, layers)) for file in each_file(one)}):
        size_of(name, path)


def size_of(name: str, path: str) -> tuple[int, int]:
    """(width, height) of the file of an input; raises `InputError` if it cannot be read."""
    return check_picture(path)


def fit_to_inputs(checkpoint: Checkpoint, settings: Settings) -> Settings:
    """The same with the very size of video that fits what it is made of, and a log line if that is another.

    Raises `InputError` for what the checkpoint does not take, for what it takes that is not given, and for files that
    cannot be read.
    """
    check_taken(checkpoint, settings)
    video, shaping = settings.video, next((name for name in ("image", "src_video") if name in settings.inputs), None)
    if shaping is None:
        # Every size of a video of text alone is exact.
        return replace(settings, video=replace(video, exact_size=False)) if video.exact_size else settings
    if video.exact_size:
        return settings
    given, asked = size_of(shaping, str(settings.inputs[shaping])), video.size
    size = checkpoint.family.fit_size(checkpoint.layout, given, asked)
    if size != asked:
        what = "source video" if shaping in VIDEOS else "picture"
        said = ("x".join(map(str, one)) for one in (size, given, asked))
        log.info(f"size: %s fits the {what}, which is %s; %s was asked for", *said)
    return replace(settings, video=replace(video, size=size, exact_size=True))


def check_taken(checkpoint: Checkpoint, settings: Settings) -> None:
    """Raise `InputError` for inputs of settings that a checkpoint does not take, and those that it lacks."""
    given, kind = settings.inputs, settings.model.kind
    required, optional = checkpoint.family.inputs_of(checkpoint.layout, kind)
    own, taken = kind or checkpoint.kind or checkpoint.name, sorted(required | optional)
    for name, path in each_file(given):
        if name not in taken:
            takes = f"takes {', '.join(taken)}" if taken else "starts from text alone"
            raise InputError(f"{name} {path} is not taken by {own}, which {takes}; leave it out")
    # The first picture before the last.
    for name in sorted(required - given.keys()):
        raise InputError(f"videos of {own} {LACKS[name]}; give one with --{name} FILE")
    if "src_mask" in given and "src_video" not in given:
        raise InputError(
            f"src_mask {settings.src_mask} says which parts of a source video are made anew; give that as --src_video"
        )
    if settings.sampling.context_scale != 1 and "src_video" not in taken:
        scale = settings.sampling.context_scale
        raise InputError(f"context_scale {scale:g} is of a source video, which {own} does not take; leave it out")


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
