"""From noise to latents: the denoising loop, and what of a transformer follows its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wan.attention.apply import applied_attention
from wan.caches.applied import step_cache_of
from wan.sampling.solvers import Solver

# From latents (B, C, T, h, w) in float32, timesteps (B,) and the conditions of a guidance branch, to the velocity in
# float32, of the latents' shape.
Predict = Callable[[Tensor, Tensor, Any], Tensor]


class Cancelled(Exception):
    """Raised by an `Observer` to end a video early, at the wish of who asked for it."""


class Conditions(NamedTuple):
    """What guides a video, as its model takes it: of the prompt, and of the negative one (None without guidance).

    both: of the two as one batch, the prompt's first, where they are to run so
    """

    prompt: Any
    negative: Any | None = None
    both: Any | None = None


@torch.no_grad()
def denoise(
    predict: Predict,
    latents: Tensor,
    conditions: Conditions,
    solver: Solver,
    guide_scale: float,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int, Tensor], None] = lambda step, clean: None,
    gather: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    in_branch: Callable[[str, int], AbstractContextManager] = lambda name, step: nullcontext(),
) -> Tensor:
    """Walk latents (B, C, T, h, w), float32 noise, down the solver's sigmas to clean latents.

    before_step: is told each step, from 0, before its forwards; after_step: also the clean latents that it predicts;
        what they raise ends the walk
    gather: gives the predictions of both branches for that of this process's own, which has `conditions.prompt` then
    in_branch: what each forward runs in, given a name of its guidance branch and the step
    """
    guided = guide_scale != 1

    def velocity(latents: Tensor, timestep: Tensor, conditions: Any, branch: str = "prompt") -> Tensor:
        with in_branch(branch, step):
            return predict(latents, timestep.expand(len(latents)), conditions)

    for step, timestep in enumerate(solver.timesteps):
        before_step(step)
        negative: Tensor | None
        if gather is not None:
            prediction, negative = gather(velocity(latents, timestep, conditions.prompt))
        elif guided and conditions.both is not None:
            prediction, negative = velocity(torch.cat((latents, latents)), timestep, conditions.both).chunk(2)
        else:
            prediction = velocity(latents, timestep, conditions.prompt)
            negative = velocity(latents, timestep, conditions.negative, "negative") if guided else None
        if guided:
            assert negative is not None
            prediction = negative + guide_scale * (prediction - negative)
        clean = latents - solver.sigmas[step] * prediction
        latents = solver.step(prediction, timestep, latents, return_dict=False)[0]
        after_step(step, clean)
    return latents


@contextmanager
def video_steps(transformer: nn.Module, steps: int) -> Iterator[Callable[[int], None]]:
    """What sets each step of a video for a transformer's attention; it and a step cache forget the video afterwards."""
    applied, cache = applied_attention(transformer), step_cache_of(transformer)
    try:
        if cache is not None:
            cache.begin(steps, applied.config.dense_steps if applied else 0)
        yield applied.steps.set_step if applied else lambda step: None
    finally:
        if cache is not None:
            cache.end()
        if applied:
            applied.steps.set_step(None)
            applied.forget_blocks()
