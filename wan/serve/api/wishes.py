"""From what a request asks to the jobs that are put in the queue."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from nabla import InputError
from wan.config.checks import check_keys, parse_size
from wan.config.prompts import check_prompt
from wan.config.settings import Settings, resolve
from wan.serve.api.models import Model
from wan.serve.api.schema import LoraRequest, VideoRequest, frames_of
from wan.serve.from_clients import check_names_no_file
from wan.serve.jobs.job import Job
from wan.serve.limits import Limits

EXTRA = ("attention", "cache")
# Seeds of several videos count up, and none may go beyond.
MAX_SEED = 2**63 - 1

Layer = dict[str, Any]


def check_pictures(model: Model, given: Collection[str]) -> None:
    """Raise `InputError` for pictures, by their settings, that a model does not take, and those that it lacks."""
    for name in given:
        if name not in model.inputs.taken:
            raise InputError(f"{name} is not taken by model {model.name}; leave it out")
    for name in sorted(model.inputs.required - set(given)):
        raise InputError(f"{name} is missing: videos of model {model.name} are made from a picture; send one")


def settle(model: Model, request: VideoRequest, limits: Limits, library: Mapping[str, str]) -> Settings:
    """The settings that a request asks for, its seed drawn.

    library: paths of LoRA files by the names of these
    Raises `InputError` for what is not allowed, or is beyond the limits.
    """
    # Before the settings do, which would say how it is given on a command line.
    check_prompt(request.prompt, "in prompt")
    most = {"n": limits.n, "priority": limits.priority}
    for name, limit in most.items():
        if getattr(request, name) > limit:
            raise InputError(f"{name} {getattr(request, name)} is more than {limit}, the most here")
    limits.check_text("negative_prompt", request.negative_prompt or "")
    extra = request.extra_params or {}
    check_keys("extra_params", extra, EXTRA)
    check_names_no_file(extra)
    layer: Layer = {
        "prompt": request.prompt,
        "sampling": _given(
            negative_prompt=request.negative_prompt,
            steps=request.num_inference_steps,
            guide_scale=_guidance(request),
            shift=request.flow_shift,
            seed=request.seed,
        ),
        "video": _given(size=_size(request), fps=request.fps, frame_num=_frames(model, request)),
        "lora": _loras(model, request.lora, library),
    }
    settings = model.resolve(layer | extra)
    limits.check(settings)
    return settings.with_seed()


def remixed(source: Job, prompt: str, limits: Limits) -> Layer:
    """The settings of a job with another prompt. Raises `InputError`, also for limits that were wider then."""
    check_prompt(prompt, "in prompt")
    layer = dict(source.wish.layer)
    # What the other prompt was expanded to says what the other video shows.
    layer.pop("expanded_prompt", None)
    # The page leaves a seed to be drawn, which is known once the video is made.
    seed = (source.settings or layer)["sampling"]["seed"]
    layer |= {"prompt": prompt, "sampling": {**layer["sampling"], "seed": seed}}
    limits.check(resolve(layer))
    return layer


def counted_up(settings: Settings, count: int) -> list[Layer]:
    """The layers of several videos, whose seeds count up."""
    first = settings.sampling.seed
    assert first is not None
    if first + count - 1 > MAX_SEED:
        raise InputError(f"seed {first} and {count - 1} more go beyond {MAX_SEED}; use a lower one")
    every = (replace(settings, sampling=replace(settings.sampling, seed=first + number)) for number in range(count))
    return [one.to_dict() for one in every]


def _given(**values: Any) -> Layer:
    return {key: value for key, value in values.items() if value is not None}


def _size(request: VideoRequest) -> tuple[int, int] | None:
    sides = request.width, request.height
    if sides == (None, None):
        return None if request.size is None else parse_size(request.size)
    if None in sides or request.size is not None:
        raise InputError("size is given by width and height, or as 1280x720; give either, and both sides")
    return parse_size(sides)


def _frames(model: Model, request: VideoRequest) -> int | None:
    if request.seconds is None:
        return request.num_frames
    if request.num_frames is not None:
        raise InputError("seconds and num_frames both say how long the video is; give one")
    fps = request.fps or model.resolve({}, needs_prompt=False).video.fps
    return frames_of(request.seconds, fps, model.checkpoint.geometry.vae_stride[0])


def _guidance(request: VideoRequest) -> float | tuple[float, float] | None:
    high, low = request.guidance_scale, request.guidance_scale_2
    if low is None or high is None:
        if low is not None:
            raise InputError("guidance_scale_2 is the low-noise expert's; give guidance_scale, the other's, too")
        return high
    return low, high


def _loras(model: Model, asked: list[LoraRequest] | None, library: Mapping[str, str]) -> list[Any] | None:
    """The model's own LoRA files and those that are asked for; None for the model's own alone."""
    if not asked:
        return None
    files = []
    for one in asked:
        path = library.get(one.name) or library.get(f"{one.name}.safetensors")
        if path is None:
            others = f"use {', '.join(library)}" if library else "the server has none"
            raise InputError(f"lora {one.name!r} is not here; {others}")
        files.append({"file": path, "scale": one.scale, "expert": one.expert})
    return [*model.resolve({}, needs_prompt=False).to_dict()["lora"], *files]
