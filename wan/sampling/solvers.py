"""The published solvers: schedulers of diffusers on the published schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from wan.config.checks import check_sampling

TRAIN_TIMESTEPS = 1000
Solver: TypeAlias = UniPCMultistepScheduler | DPMSolverMultistepScheduler | FlowMatchEulerDiscreteScheduler


class Kind(NamedTuple):
    """A scheduler, and the schedule on which it was published.

    sigmas: before shifting, from those that the published programs start at, each elsewhere, to 0, for so many steps;
        they are shifted in their type
    timesteps: the type that they are rounded down to
    """

    scheduler: type[Solver]
    sigmas: Callable[[int], Tensor]
    timesteps: torch.dtype
    options: Mapping[str, Any] = {}


def _numpy_sigmas(first: float) -> Callable[[int], Tensor]:
    return lambda steps: torch.from_numpy(np.linspace(first, 0, steps + 1))


def _torch_sigmas(first: float) -> Callable[[int], Tensor]:
    # In float32, and from both ends to the middle, which numpy does not.
    return lambda steps: torch.linspace(first, 0, steps + 1)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# arXiv 2302.04867, which starts at a float32 number; 2211.01095; Euler's method. Another solver is a line here, and one
# in `wan.config.checks.SOLVERS`.
KINDS: dict[str, Kind] = {
    "unipc": Kind(UniPCMultistepScheduler, _numpy_sigmas(float(np.float32(0.999))), torch.int64, FLOW),
    "dpm++": Kind(DPMSolverMultistepScheduler, _numpy_sigmas(1.0), torch.int64, FLOW),
    "euler": Kind(FlowMatchEulerDiscreteScheduler, _torch_sigmas(1.0), torch.float32),
}


def make_solver(name: str, steps: int, shift: float, device: torch.device | str = "cpu") -> Solver:
    """A scheduler of diffusers on the published schedule.

    Its own flow sigmas differ by about 0.1 %, enough to change the video that a seed gives. Raises `InputError` for
    settings outside what is allowed.
    """
    check_sampling(name, steps, shift, guide_scale=1)
    kind = KINDS[name]
    solver = kind.scheduler(num_train_timesteps=TRAIN_TIMESTEPS, **kind.options)
    solver.set_timesteps(steps)
    sigmas = kind.sigmas(steps)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    # Set rather than passed: DPM-Solver's set_timesteps takes no sigmas, and Euler's would shift them once more.
    solver.sigmas = sigmas.float()
    solver.timesteps = (sigmas[:-1] * TRAIN_TIMESTEPS).to(device, kind.timesteps)
    solver.set_begin_index(0)
    return solver
