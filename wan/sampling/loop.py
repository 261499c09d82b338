"""From noise to latents: the denoising loop, and what of a transformer follows its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    guide_scale: float | Sequence[float],
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int, Tensor], None] = lambda step, clean: None,
    gather: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    in_branch: Callable[[str, int], AbstractContextManager] = lambda name, step: nullcontext(),
    hold: Callable[[Tensor], Tensor] = lambda latents: latents,
) -> Tensor:
    """Walk latents (B, C, T, h, w), float32 noise, down the solver's sigmas to clean latents.

    guide_scale: of all steps, or of each; a step of 1 runs without its negative branch
    before_step: is told each step, from 0, before its forwards; after_step: also the clean latents that it predicts;
        what they raise ends the walk
    gather: gives the predictions of both branches for that of this process's own, which has `conditions.prompt` then
    in_branch: what each forward runs in, given a name of its guidance branch and the step
    hold: puts back into latents, before the walk and after each step, what is given of them
    """
    scales = guide_scale if isinstance(guide_scale, Sequence) else [guide_scale] * len(solver.timesteps)

    def velocity(latents: Tensor, timestep: Tensor, conditions: Any, branch: str = "prompt") -> Tensor:
        with in_branch(branch, step):
            return predict(latents, timestep.expand(len(latents)), conditions)

    latents = hold(latents)
    for step, timestep in enumerate(solver.timesteps):
        before_step(step)
        guided = scales[step] != 1
        negative: Tensor | None
        if gather is not None:
            # Without guidance too, since only one of the processes has the prompt's.
            prediction, negative = gather(velocity(latents, timestep, conditions.prompt))
        elif guided and conditions.both is not None:
            prediction, negative = velocity(torch.cat((latents, latents)), timestep, conditions.both).chunk(2)
        else:
            prediction = velocity(latents, timestep, conditions.prompt)
            negative = velocity(latents, timestep, conditions.negative, "negative") if guided else None
        if guided:
            assert negative is not None
            prediction = negative + scales[step] * (prediction - negative)
        clean = hold(latents - solver.sigmas[step] * prediction)
        latents = hold(solver.step(prediction, timestep, latents, return_dict=False)[0])
        after_step(step, clean)
    return latents


@contextmanager
def video_steps(transformers: Sequence[nn.Module], steps: int) -> Iterator[Callable[[int], None]]:
    """What sets each step of a video for the attention of its transformers; afterwards these forget the video.

    Dense steps and those of step caches are counted over the whole video, whichever of the transformers run in them.
    """
    attention = [applied for one in transformers if (applied := applied_attention(one)) is not None]
    # Transformers that share a counter are told of a step once, since each first step is one of a new video.
    counters = list({id(applied.steps): applied.steps for applied in attention}.values())

    def set_step(step: int | None) -> None:
        for counter in counters:
            counter.set_step(step, None if step is None else steps)

    try:
        for one in transformers:
            applied, cache = applied_attention(one), step_cache_of(one)
            if cache is not None:
                cache.begin(steps, applied.config.dense_step_count(steps) if applied else 0)
        yield set_step
    finally:
        for one in transformers:
            forget_video(one)
        set_step(None)


def forget_video(transformer: nn.Module) -> None:
    """Free what a transformer's attention and step cache keep of a video."""
    applied, cache = applied_attention(transformer), step_cache_of(transformer)
    if cache is not None:
        cache.end()
    if applied is not None:
        applied.forget_blocks()
