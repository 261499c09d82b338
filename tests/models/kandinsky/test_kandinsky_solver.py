"""Euler's method on the schedule of Kandinsky-5, against what the reference program computes."""

from __future__ import annotations

import pytest
import torch
from kandinsky_set import expected

from wan.sampling.solvers import make_solver


@pytest.mark.parametrize("steps, shift", ((5, 3.0), (16, 5.0), (16, 10.0), (50, 5.0), (50, 10.0)))
def test_timesteps_and_a_walk(steps, shift):
    made, prefix = make_solver("euler", steps, shift), f"solver.{steps}.{shift}"
    torch.testing.assert_close(made.timesteps, expected()[f"{prefix}.timesteps"], atol=0, rtol=1e-6)
    x = expected()["solver.noise"]
    for timestep in made.timesteps:
        x = made.step(torch.sin(3 * x) + timestep / 1000, timestep, x, return_dict=False)[0]
    torch.testing.assert_close(x, expected()[f"{prefix}.final"], atol=1e-6, rtol=0)
