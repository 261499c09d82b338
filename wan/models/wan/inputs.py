"""What a video is made of beside a prompt, as it is given in Python: read, and in whose form the video is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from nabla import InputError
from wan.config.inputs import INPUTS
from wan.config.settings import SamplingSettings, VideoSettings, changed
from wan.files.picture import picture_of
from wan.files.source_video import check_pair, mask_of, video_of
from wan.models.family import MediaInputs
from wan.models.wan.kinds import Kind
from wan.sampling.request import VideoRequest


def request_of(
    kind: Kind,
    prompt: str,
    video: VideoSettings,
    sampling: SamplingSettings,
    inputs: Mapping[str, object],
    exact_size: bool = False,
) -> VideoRequest:
    """A request of inputs by their names, None for those that are not given.

    exact_size: whether the video has its very size; else it has the form of what is given
    Raises `InputError` for inputs that are not known, not taken or missing, and for what cannot be read.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    if unknown := given.keys() - set(INPUTS):
        raise InputError(f"{min(unknown)!r} is no input of a video; use {', '.join(INPUTS)}")
    check_given(given, kind.inputs)
    if sampling.context_scale != 1 and "src_video" not in kind.inputs.taken:
        raise InputError("context_scale is not taken by this checkpoint, which takes no source video; leave it out")
    request = VideoRequest(prompt, video, sampling, **{name: _read(name, value) for name, value in given.items()})
    check_pair(request.src_video, request.src_mask)
    return request if exact_size else replace(request, video=fitted(kind, request))


def check_given(given: Collection[str], inputs: MediaInputs) -> None:
    """Raise `InputError` for inputs, by their names, that are not taken, and for one that is required and missing."""
    for name in sorted(inputs.required):
        if name not in given:
            raise InputError(f"{name} is missing: this checkpoint's videos are made of one; give it")
    for name in sorted(given):
        if name not in inputs.taken:
            takes = f"takes {' and '.join(sorted(inputs.taken))}" if inputs.taken else "starts from text alone"
            raise InputError(f"{name} is not taken by this checkpoint, which {takes}; leave it out")


def fitted(kind: Kind, request: VideoRequest) -> VideoSettings:
    """The video in the form of its source, no longer than that is, or of the picture that it begins with."""
    video, source = request.video, request.src_video
    if source is not None:
        frames = video.geometry.most_frames(min(source.count, video.frame_num))
        return changed(video, size=kind.fit(source.size, video.size), frame_num=frames)
    if request.image is not None:
        height, width, _ = request.image.shape
        return changed(video, size=kind.fit((width, height), video.size))
    return video


def _read(name: str, value: Any) -> Any:
    if name == "src_ref_images":
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            raise InputError(f"src_ref_images {value!r} is no list of pictures; put even one in brackets")
        return tuple(picture_of(one, name) for one in value)
    if name == "src_video":
        return video_of(value)
    return mask_of(value) if name == "src_mask" else picture_of(value, name)
