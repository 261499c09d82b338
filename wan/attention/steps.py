"""Which sampling step a forward belongs to."""

from __future__ import annotations

from torch import Tensor


class StepCounter:
    """The sampling step that a forward belongs to, from 0: told by the loop, or else seen from the timesteps.

    Timesteps fall from step to step; one that rises begins a new video. Two steps of equal timestep count as one, so a
    video that begins where the last one ended, as after a single step, is not seen as new unless it is told.
    """

    def __init__(self) -> None:
        self.told: int | None = None
        self.video = 0
        self.step = 0
        self.timestep = float("-inf")

    def tell(self, step: int | None) -> None:
        """State the step of the forwards to come; None leaves it to the timesteps again, from a new video on."""
        self.told = step
        self.video += step == 0
        self.timestep = float("-inf")

    def see(self, timestep: Tensor) -> int:
        """The step that a forward with this timestep belongs to."""
        if self.told is not None:
            return self.told
        value = timestep.max().item()
        if value != self.timestep:
            begins = value > self.timestep
            self.video += begins
            self.step = 0 if begins else self.step + 1
            self.timestep = value
        return self.step
