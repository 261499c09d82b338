"""Training of Wan's other kinds: an expert's own timesteps, pictures beside the noise, a first frame that is given."""

from __future__ import annotations

import pytest
import torch

from nabla import InputError
from wan.training.objective import sigmas_from_quantiles
from wan.training.objective_settings import ObjectiveSettings


@pytest.mark.parametrize("timesteps, shift", (("logit_normal", 5.0), ("uniform", 3.0), ("logit_normal", 12.0)))
@pytest.mark.parametrize("low, high", ((875, None), (None, 900), (200, 700)))
def test_a_range_of_timesteps_leaves_of_the_distribution_what_is_in_it(timesteps, shift, low, high):
    every = ObjectiveSettings(timesteps, shift=shift)
    within = ObjectiveSettings(timesteps, shift=shift, min_timestep=low, max_timestep=high)
    quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    # The slow way: of all levels those between the limits.
    least, most = (low or 0) / 1000, (high or 1000) / 1000
    drawn = sigmas_from_quantiles(quantiles, every)
    kept = drawn[(drawn >= least) & (drawn <= most)].sort().values
    ours = sigmas_from_quantiles((torch.arange(len(kept), dtype=torch.float64) + 0.5) / len(kept), within)
    assert ours.dtype == torch.float32 and least <= ours.min() and ours.max() <= most
    torch.testing.assert_close(ours, kept, atol=5e-3, rtol=0)


def test_limits_that_leave_nothing_out_change_no_bit():
    quantiles = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for timesteps in ("logit_normal", "uniform"):
        every = sigmas_from_quantiles(quantiles, ObjectiveSettings(timesteps))
        limited = ObjectiveSettings(timesteps, min_timestep=0, max_timestep=1000)
        assert torch.equal(sigmas_from_quantiles(quantiles, limited), every)


@pytest.mark.parametrize(
    "limits, message",
    (
        ({"min_timestep": -1}, "min_timestep -1 is not a number at least 0, at most 1000"),
        ({"max_timestep": 1001}, "max_timestep 1001 is not a number at least 0, at most 1000"),
        ({"max_timestep": "all"}, "max_timestep 'all' is not a number"),
        ({"min_timestep": 900, "max_timestep": 875}, "min_timestep 900 is not below max_timestep 875"),
        ({"min_timestep": 1000}, "min_timestep 1000 is not below max_timestep 1000"),
    ),
)
def test_limits_that_are_none_are_refused(limits, message):
    with pytest.raises(InputError, match=message):
        ObjectiveSettings(**limits)


def test_a_range_with_next_to_no_levels_in_it_is_refused():
    narrow = ObjectiveSettings(max_timestep=1e-3)
    with pytest.raises(InputError, match="min_timestep 0 and max_timestep 0.001 hold next to none of the noise levels"):
        sigmas_from_quantiles(torch.tensor([0.5]), narrow)
