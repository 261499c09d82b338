"""From noise to latents: the published solvers, guidance, and the denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from wan.attention.apply import applied_attention
from wan.caches.applied import step_cache_of
from wan.config.checks import check_sampling

TRAIN_TIMESTEPS = 1000
# The first sigma before shifting; the published programs start each solver elsewhere, unipc at a float32 number.
KINDS = {
    "unipc": (UniPCMultistepScheduler, float(np.float32(0.999))),
    "dpm++": (DPMSolverMultistepScheduler, 1.0),
}

Solver = UniPCMultistepScheduler | DPMSolverMultistepScheduler


class Cancelled(Exception):
    """Raised by an `Observer` to end a video early, at the wish of who asked for it."""


def make_solver(name: str, steps: int, shift: float, device: torch.device | str = "cpu") -> Solver:
    """A scheduler of diffusers on the published schedule.

    Its own flow sigmas differ by about 0.1 %, enough to change the video that a seed gives. Raises `InputError` for
    settings outside what is allowed.
    """
    check_sampling(name, steps, shift, guide_scale=1)
    kind, first = KINDS[name]
    solver = kind(
        num_train_timesteps=TRAIN_TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    solver.set_timesteps(steps)
    sigmas = np.linspace(first, 0, steps + 1)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    solver.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
    solver.timesteps = torch.from_numpy((sigmas * TRAIN_TIMESTEPS).astype(np.int64)).to(device)
    solver.set_begin_index(0)
    return solver


@torch.no_grad()
def denoise(
    transformer: nn.Module,
    latents: Tensor,
    context: Tensor,
    negative_context: Tensor | None,
    solver: Solver,
    guide_scale: float,
    batch_guidance: bool = False,
    at_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int, Tensor], None] = lambda step, clean: None,
    gather: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    in_branch: Callable[[str, int], AbstractContextManager] = lambda name, step: nullcontext(),
) -> Tensor:
    """Walk latents (B, C, T, h, w), float32 noise, down the solver's sigmas to clean latents.

    context, negative_context: text states (B, L, C); the negative ones are not needed at guide_scale 1
    batch_guidance: run both guidance branches as one batch instead of one after the other
    at_step: is told each step, from 0, before its forwards; after_step: also the
        clean latents that it predicts; what they raise ends the walk
    gather: gives the predictions of both branches for that of this process's own, whose text states `context` are then
    in_branch: what each forward runs in, given a name of its guidance branch and the step
    """
    dtype = transformer.dtype
    guided = guide_scale != 1
    both = torch.cat((context, negative_context)) if guided and batch_guidance else None

    def velocity(text: Tensor, timestep: Tensor, branch: str = "prompt") -> Tensor:
        copies = len(text) // len(latents)
        model_input = latents.to(dtype).repeat(copies, 1, 1, 1, 1)
        with in_branch(branch, step):
            return transformer(model_input, timestep.expand(len(text)), text, return_dict=False)[0].float()

    for step, timestep in enumerate(solver.timesteps):
        at_step(step)
        if gather is not None:
            prediction, negative = gather(velocity(context, timestep))
        elif both is not None:
            prediction, negative = velocity(both, timestep).chunk(2)
        else:
            prediction = velocity(context, timestep)
            negative = velocity(negative_context, timestep, "negative") if guided else None
        if guided:
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
