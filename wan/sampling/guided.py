"""A video by a pipeline of any family: its stages, and its guidance on one process or on several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nabla import InputError
from wan.attention.apply import applied_attention
from wan.attention.compile import many_compiles
from wan.caches.applied import step_cache_of
from wan.config.model_settings import LoraFile
from wan.config.settings import SamplingSettings, VideoSettings
from wan.files.video import to_frames
from wan.memory.planner import MemoryPlan
from wan.observe.observer import ObservedPipeline, Observer
from wan.parallel.collectives import gather_guidance
from wan.sampling.experts import expert_steps, experts_of
from wan.sampling.finite import check_latents
from wan.sampling.loop import Conditions, denoise, video_steps
from wan.sampling.request import VideoRequest
from wan.sampling.solvers import make_solver


class GuidedPipeline(ObservedPipeline, Protocol):
    """What a pipeline is asked for: `encode`, `predict` and `decode`, and what these work on.

    `glimpse` and `prompt_notes` are for who watches a video being made.

    running: the one of its `transformers` that `predict` calls, set by who walks down the steps
    boundary: share of all timesteps from which on the first of two transformers runs; None where there is one
    offload: whether its models wait in host memory; lora: what is merged into the transformers
    seconds: where the time of each stage is written; plan: of memory, by which the models were loaded
    """

    transformer: Any
    running: Any
    boundary: float | None
    vae: Any
    offload: bool
    lora: Sequence[LoraFile]
    seconds: dict[str, float]
    plan: MemoryPlan | None

    def encode(self, request: VideoRequest) -> Conditions:
        """What guides a video, on all processes that share it."""

    def predict(self, latents: Tensor, timestep: Tensor, conditions: Any) -> Tensor:
        """The velocity in float32, of the latents' shape, in one guidance branch."""

    def hold(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Latents, before the first step and after each, with what is given of them put back."""

    def decode(self, latents: Tensor) -> Tensor:
        """The video (B, 3, frames, height, width) in [-1, 1] of latents."""

    def finish(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """What is done to sampled latents before they are decoded."""

    def glimpse(self, latents: Tensor) -> Tensor:
        """The first frame (B, 3, height, width) in [-1, 1] of latents on any device: cheap beside `decode`."""

    def prompt_notes(self, *prompts: str) -> tuple[str, ...]:
        """A line for each prompt of which a text encoder takes only a part."""

    def expand_prompt(self, prompt: str, image: Any = None) -> str:
        """The prompt as the language model writes it out, on all processes that share a video; of families that do."""

    def draw_noise(self, video: VideoSettings, seed: int, conditions: Conditions | None = None) -> Tensor:
        """Float32 noise (1, C, T, h, w) for a video, which conditions may ask more frames of."""

    def describe_attention(self, video: VideoSettings) -> str:
        """One line of the attention in a video of this size."""

    def generate(self, prompt: str, **settings: Any) -> np.ndarray | None:
        """`make_video` of settings by their names, (frames, height, width, 3) uint8; None where it does not lead."""

    def batch_branches(self, conditions: Conditions, latents: Tensor) -> Any | None:
        """The conditions of both guidance branches as one batch, the prompt's first, if that is faster; else None."""


def make_video(pipe: GuidedPipeline, request: VideoRequest, observer: Observer) -> np.ndarray | None:
    """A video (frames, height, width, 3) uint8; None on a process that does not lead. The seed has to be drawn."""
    pipe.seconds, sampling = {}, request.sampling
    with observer.video(pipe, request.prompt, request.video, sampling):
        with _stage(pipe, "text", observer):
            conditions = pipe.encode(request)
        with _stage(pipe, "sampling", observer):
            assert sampling.seed is not None, "a request has its seed drawn"
            noise = pipe.draw_noise(request.video, sampling.seed, conditions)
            if pipe.distributed is not None:
                # Without a seed given, each process has drawn one of its own.
                noise = pipe.distributed.broadcast_from_leader(noise.contiguous())
            latents = sample_latents(pipe, noise, conditions, sampling, observer)
        if not pipe.is_leader:
            return None
        with _stage(pipe, "decode", observer):
            return to_frames(pipe.decode(pipe.finish(latents, conditions))[0])


@torch.no_grad()
def sample_latents(
    pipe: GuidedPipeline, latents: Tensor, conditions: Conditions, sampling: SamplingSettings, observer: Observer
) -> Tensor:
    """Denoise float32 noise (B, C, T, h, w) on the pipeline's device to latents of the same shape.

    Processes that share a video must be given the same. Raises `InputError` for latents that are not finite.
    """
    sampling.check_experts(len(pipe.transformers))
    gather, solver = None, make_solver(sampling.solver, sampling.steps, sampling.shift, pipe.device)
    if sampling.guided:
        conditions, gather = _own_branches(pipe, conditions)
    numbers = experts_of(solver.timesteps, pipe.boundary)
    scales = [sampling.guide_scale_of(number) for number in numbers]

    def forwards(step: int) -> int:
        return 1 if gather is not None or conditions.both is not None or scales[step] == 1 else 2

    with (
        video_steps(pipe.transformers, sampling.steps) as set_step,
        expert_steps(pipe, numbers, forwards) as experts,
        many_compiles(),
        observer.sampling(pipe, sampling, latents),
    ):

        def before_step(step: int) -> None:
            experts.begin(step)
            set_step(step)
            observer.step_begins(step)

        def after_step(step: int, clean: Tensor) -> None:
            # What overflows mostly does at once, and the other steps may take hours.
            if experts.is_first(step):
                _check(pipe, clean, sampling, experts.name(step))
            observer.step_ends(step, clean)

        if sampling.guided and _may_batch(pipe):
            # Asked with a transformer's weights in their place, since it depends on what they leave free.
            experts.begin(0)
            conditions = conditions._replace(both=pipe.batch_branches(conditions, latents))
        latents = denoise(
            pipe.predict,
            latents,
            conditions,
            solver,
            scales,
            before_step=before_step,
            after_step=after_step,
            gather=gather,
            in_branch=partial(_in_branch, pipe),
            hold=partial(pipe.hold, conditions=conditions),
        )
        _check(pipe, latents, sampling, experts.name(sampling.steps - 1))
    return latents


def _check(pipe: GuidedPipeline, latents: Tensor, sampling: SamplingSettings, expert: str | None) -> None:
    """Raise `InputError` unless latents that an expert has just sampled are finite."""
    merged = [one for one in pipe.lora if expert is None or one.expert in (None, expert)]
    check_latents(latents, sampling, pipe.transformer.dtype, merged, expert)


def _in_branch(pipe: GuidedPipeline, name: str, step: int) -> AbstractContextManager:
    cache = step_cache_of(pipe.running)
    return nullcontext() if cache is None else cache.branch(name, step)


def _own_branches(pipe: GuidedPipeline, conditions: Conditions) -> tuple[Conditions, Callable | None]:
    """The conditions of guidance branches that this process runs, and, if not both, what gives both predictions."""
    if pipe.distributed is None or pipe.distributed.layout.cfg == 1:
        return conditions, None
    if _shares_masks(pipe):
        raise InputError("guidance branches that share masks (mask_refresh) cannot run apart; set cfg_size 1")
    branches = pipe.distributed.cfg_mesh
    return Conditions(conditions[branches.get_local_rank()]), partial(gather_guidance, mesh=branches)


def _may_batch(pipe: GuidedPipeline) -> bool:
    """Whether guidance branches may run as one batch: not where something is kept for each of them."""
    alone = pipe.distributed is None or pipe.distributed.layout.processes_per_video == 1
    return alone and not _shares_masks(pipe) and pipe.cache is None


def _shares_masks(pipe: GuidedPipeline) -> bool:
    """Whether guidance branches take over each other's blocks; as one batch each would keep blocks of its own."""
    every = map(applied_attention, pipe.transformers)
    return any(applied is not None and applied.config.mask_refresh > 1 for applied in every)


@contextmanager
def _stage(pipe: GuidedPipeline, name: str, observer: Observer) -> Iterator[None]:
    observer.stage_begins(name)
    start = time.perf_counter()
    yield
    if pipe.device.type == "cuda":
        # Else the time of what a stage has only asked for would be the next one's.
        torch.cuda.synchronize(pipe.device)
    pipe.seconds[name] = time.perf_counter() - start
    observer.stage_ends(name, pipe.seconds[name])
