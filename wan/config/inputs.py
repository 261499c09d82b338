"""What a video may be made of beside a prompt: files, by the names of the settings that say where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nabla import InputError
from wan.config.checks import absolute_path

# Of settings, of the fields of a request, and of what pipelines are given.
INPUTS = ("image", "last_image", "src_video", "src_mask", "src_ref_images")
# Those that are videos, the others being pictures; a mask may be either.
VIDEOS = ("src_video", "src_mask")
# Those that are several files.
LISTS = ("src_ref_images",)

# A path, or those of a list.
Files = str | tuple[str, ...]


def absolute_files(name: str, given: object) -> Files:
    """The path or paths of an input made absolute; raises `InputError` for what is none. There need not be files."""
    if name not in LISTS:
        return absolute_path(name, given)
    if not isinstance(given, (list, tuple)):
        raise InputError(f"{name} {given!r} is not a list of files; put even one in brackets")
    return tuple(absolute_path(name, one) for one in given)


def inputs_of(layer: Mapping[str, Any]) -> dict[str, Files]:
    """Those that a layer of settings names, made absolute; raises as `absolute_files` does."""
    named = {name: layer[name] for name in INPUTS if layer.get(name) is not None}
    return {name: absolute_files(name, given) for name, given in named.items()}


def check_both_ends(frame_num: int) -> None:
    """Raise `InputError` for a video too short to begin with one picture and end with another."""
    if frame_num == 1:
        raise InputError("frame_num 1 is too short for a first and a last picture; use 5 or more")


def each_file(inputs: Mapping[str, Files]) -> list[tuple[str, str]]:
    """(name of the input, path) of every file of several inputs."""
    return [(name, path) for name, given in inputs.items() for path in ([given] if isinstance(given, str) else given)]
