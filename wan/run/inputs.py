"""What videos are made of beside prompts: whether it can be read and is taken, what size of video fits it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from nabla import InputError
from wan.config.config_files import read_made_with
from wan.config.inputs import VIDEOS, Files, check_both_ends, each_file, inputs_of
from wan.config.settings import Settings
from wan.files.picture import check_picture, read_picture
from wan.files.source_video import check_pair, mask_of, size_of_video, video_of
from wan.models.checkpoint import Checkpoint
from wan.run.records import record_of, recorded_otherwise

log = logging.getLogger("wan")

# What a video without one of these lacks, as a sentence goes on.
LACKS = {"image": "begin with a picture", "last_image": "end with a picture"}


def check_inputs(first: Settings, layers: Iterable[Mapping[str, Any]]) -> None:
    """Raise `InputError` for a file of the first video, or of layers of single videos, that cannot be read."""
    for name, path in sorted({file for one in (first.inputs, *map(inputs_of, layers)) for file in each_file(one)}):
        if name in VIDEOS:
            size_of_video(path, name)
        else:
            check_picture(path, name)


def fit_to_inputs(checkpoint: Checkpoint, settings: Settings) -> Settings:
    """The same with the very size and length of video that fit what it is made of, and a log line if these are others.

    Raises `InputError` for what the checkpoint does not take, for what it takes that is not given, and for files that
    cannot be read.
    """
    check_taken(checkpoint, settings)
    if settings.image is not None:
        return _fit_size(checkpoint, settings, "picture", check_picture(settings.image))
    if settings.src_video is not None:
        source = video_of(settings.src_video)
        check_pair(source, None if settings.src_mask is None else mask_of(settings.src_mask, quiet=True))
        return _fit_length(checkpoint, _fit_size(checkpoint, settings, "source video", source.size), source.count)
    # Every size of a video of text alone is exact.
    video = settings.video
    return replace(settings, video=replace(video, exact_size=False)) if video.exact_size else settings


def _fit_size(checkpoint: Checkpoint, settings: Settings, what: str, given: tuple[int, int]) -> Settings:
    video, asked = settings.video, settings.video.size
    if video.exact_size:
        return settings
    size = checkpoint.family.fit_size(checkpoint.layout, given, asked)
    if size != asked:
        said = ("x".join(map(str, one)) for one in (size, given, asked))
        log.info(f"size: %s fits the {what}, which is %s; %s was asked for (--exact_size keeps that)", *said)
    return replace(settings, video=replace(video, size=size, exact_size=True))


def _fit_length(checkpoint: Checkpoint, settings: Settings, count: int) -> Settings:
    video = settings.video
    if count >= video.frame_num:
        return settings
    fitting = checkpoint.geometry.most_frames(count)
    log.info("frames: %d fit the source video, which has %d; %d were asked for", fitting, count, video.frame_num)
    return replace(settings, video=replace(video, frame_num=fitting))


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
    if "last_image" in given:
        check_both_ends(settings.video.frame_num)
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
    return {name: _opened(name, given) for name, given in inputs.items()}, record


def _opened(name: str, given: Files) -> Any:
    if name in VIDEOS:
        # Of which frames are read where they are wanted.
        return given
    return read_picture(given, name) if isinstance(given, str) else [read_picture(path, name) for path in given]


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
