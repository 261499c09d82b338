"""The published solvers: schedulers of diffusers on the published schedule."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from wan.config.checks import check_sampling

TRAIN_TIMESTEPS = 1000
Solver: TypeAlias = UniPCMultistepScheduler | DPMSolverMultistepScheduler
# The scheduler (arXiv 2302.04867, 2211.01095), and the first sigma before shifting: the published programs start each
# elsewhere, unipc at a float32 number. Another solver is a line here, and one in `wan.config.checks.SOLVERS`.
KINDS: dict[str, tuple[type[Solver], float]] = {
    "unipc": (UniPCMultistepScheduler, float(np.float32(0.999))),
    "dpm++": (DPMSolverMultistepScheduler, 1.0),
}


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
    # Set rather than passed: DPM-Solver's set_timesteps takes no sigmas.
    solver.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
    solver.timesteps = torch.from_numpy((sigmas * TRAIN_TIMESTEPS).astype(np.int64)).to(device)
    solver.set_begin_index(0)
    return solver
