"""What goes between the server and a process that makes videos. Plain data, that pipes and networks carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LOADING, READING, SAMPLING, DECODING, WRITING = "loading", "text", "sampling", "decode", "writing"


class InputFile(NamedTuple):
    """A file that a client sent: its name, without a folder, and what is in it."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Order:
    """A video to make: the settings, in the schema of the YAML files, and the files that they lack."""

    job_id: str
    layer: Mapping[str, Any]
    inputs: Mapping[str, InputFile] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """How far a video is. seconds_left: of sampling; preview: a JPEG, or None if there is no newer one."""

    stage: str
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    notes: tuple[str, ...] = ()
    preview: bytes | None = None


@dataclass(frozen=True)
class Made:
    """A video that is made.

    files: by the names that they have in the job's folder: the video or picture, its sidecar, "thumbnail.webp",
    "spritesheet.webp"
    settings: those that it was made with, as its sidecar has them
    seconds: of each stage; peak_bytes: of GPU memory, None on a CPU; kept: share of blocks, None where dense
    """

    files: Mapping[str, bytes]
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]
    peak_bytes: int | None
    kept: float | None


@dataclass(frozen=True)
class Failed:
    """A video that cannot be made.

    code: "invalid_request" for what its user can mend, "out_of_memory", "internal_error"
    broken: whether the process has to be started again, as after an error of CUDA
    """

    code: str
    message: str
    broken: bool = False


@dataclass(frozen=True)
class Aborted:
    """A video that nobody wants any more; the process is free for another."""


Event = Progress | Made | Failed | Aborted
EVENTS_AT_THE_END = (Made, Failed, Aborted)
