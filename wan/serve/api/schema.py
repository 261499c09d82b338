"""The fields of requests and answers, by the names of OpenAI's videos API and of what servers of this field add."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from wan.config.checks import parse_size
from wan.serve.jobs.job import Job, Status
from wan.serve.workers.messages import LOADING, SAMPLING

MB = 1 << 20
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Asked(BaseModel):
    """A field that is not known is an error, since one that is passed over would be missed only in the video."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean(cls, given: Any) -> Any:
        # Pydantic would take true for 1.
        if isinstance(given, bool):
            raise PydanticCustomError("boolean", "input should be neither true nor false")
        return given


class LoraRequest(_Asked):
    """A LoRA of the server's folder, by the name of its file."""

    name: str = Field(max_length=255)
    scale: Finite = 1.0
    expert: Literal["high", "low"] | None = None


def _listed(given: Any) -> Any:
    return given if given is None or isinstance(given, list) else [given]


# One alone is read as a list of one, so that a fault in it is told as one of it.
LoraRequests = Annotated[list[LoraRequest], BeforeValidator(_listed, LoraRequest | list[LoraRequest])]


class RemixRequest(_Asked):
    prompt: str = Field(description="what the video should show in place of what the other shows")


class VideoRequest(RemixRequest):
    """A video to make. Pictures are not fields of it, see `wan.serve.api.bodies`."""

    prompt: str = Field(description="what the video should show")
    model: str | None = Field(None, description="a name of GET /v1/models; the first of them if none is given")
    seconds: Finite | None = Field(None, gt=0, le=3600, description="length; times fps it gives num_frames")
    size: str | None = Field(None, max_length=20, description="width x height in pixels, such as 1280x720")
    width: int | None = Field(None, description="with height, in place of size")
    height: int | None = Field(None, description="with width, in place of size")
    fps: int | None = Field(None, description="frames a second")
    num_frames: int | None = Field(None, description="frames, 4n+1; in place of seconds")
    negative_prompt: str | None = Field(None, description="what the video should not show")
    num_inference_steps: int | None = Field(None, description="steps of sampling")
    guidance_scale: Finite | None = Field(None, description="1 turns guidance off; of two experts the high-noise one's")
    guidance_scale_2: Finite | None = Field(None, description="of the low-noise expert")
    flow_shift: Finite | None = Field(None, description="higher ones spend more steps on high noise")
    seed: int | None = Field(None, description="drawn if there is none")
    n: int = Field(1, ge=1, description="videos, whose seeds count up")
    lora: LoraRequests | None = Field(
        None, description="name, scale and expert of files of the server, beside the model's"
    )
    extra_params: dict[str, Any] | None = Field(None, description="attention and cache, as in the files of configs/")
    priority: int = Field(0, ge=-100, description="jobs of a higher one are made first, as far as the operator lets")
    user: str | None = Field(None, description="taken, and of no effect")


class VideoError(BaseModel):
    code: str
    message: str


class VideoObject(BaseModel):
    """A video, whether it is made yet or not. Times are seconds since 1970.

    jobs_ahead: how many are made before it, where it was asked after alone
    videos: ids of all videos of the request, where it asked for several
    """

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    size: str
    seconds: str
    prompt: str
    remixed_from_video_id: str | None = None
    error: VideoError | None = None
    num_frames: int
    fps: int
    seed: int | None = None
    stage: str | None = None
    seconds_left: float | None = None
    jobs_ahead: int | None = None
    notes: list[str] = []
    inference_time_s: float | None = None
    stage_durations: dict[str, float] | None = None
    peak_memory_mb: float | None = None
    kept_share: float | None = None
    videos: list[str] | None = None


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    description: str
    input_reference: bool


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


def video_object(job: Job, ahead: int | None = None, videos: list[str] | None = None) -> VideoObject:
    """A job as its client sees it."""
    layer: Mapping[str, Any] = job.settings or job.wish.layer
    video, is_done = layer["video"], job.status is Status.COMPLETED
    is_running = job.status is Status.IN_PROGRESS
    return VideoObject(
        id=job.id,
        model=job.wish.model,
        status=job.status,
        progress=job.progress,
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        # As one of the page has it, a text.
        size="x".join(map(str, parse_size(video["size"]))),
        seconds=f"{seconds_of(video['frame_num'], video['fps']):g}",
        prompt=job.wish.layer["prompt"],
        remixed_from_video_id=job.wish.remixed_from,
        error=None if job.error is None else VideoError(code=job.error.code, message=job.error.message),
        num_frames=video["frame_num"],
        fps=video["fps"],
        seed=layer["sampling"]["seed"],
        stage=job.stage if is_running else None,
        seconds_left=job.seconds_left if is_running and job.stage == SAMPLING else None,
        jobs_ahead=ahead,
        notes=[*job.notes],
        inference_time_s=inference_seconds(job) if is_done else None,
        stage_durations={name: round(seconds, 3) for name, seconds in job.seconds.items()} if is_done else None,
        peak_memory_mb=None if job.peak_bytes is None else round(job.peak_bytes / MB, 1),
        kept_share=None if job.kept is None else round(job.kept, 4),
        videos=videos,
    )


def inference_seconds(job: Job) -> float:
    """What a video took, without the load of a model that was not there yet."""
    return round(math.fsum(seconds for stage, seconds in job.seconds.items() if stage != LOADING), 3)


def seconds_of(frames: int, fps: int) -> float:
    """The length of a video: its first frame, from which the others go on, takes no time."""
    return round((frames - 1) / fps, 3)


def frames_of(seconds: float, fps: int, step: int) -> int:
    """The frames of a length, the first beside a whole multiple of `step`: 5 s of 16 a second are 81."""
    # Halves go up, where round() would go to the even neighbour.
    return step * math.floor(seconds * fps / step + 0.5) + 1
