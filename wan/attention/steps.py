"""Which sampling step a forward belongs to."""

from __future__ import annotations

from torch import Tensor


class StepCounter:
    """The sampling step that a forward belongs to, from 0: set by the loop, or else read off the timesteps.

    Timesteps fall from step to step; one that rises begins a new video. Two steps of equal timestep count as one, so a
    video that begins where the last one ended, as after a single step, is not seen as new unless its steps are set.

    video: a number that differs from video to video
    steps: how many the video has, where the loop says it
    """

    def __init__(self) -> None:
        self.given: int | None = None
        self.steps: int | None = None
        self.video = 0
        self.step = 0
        # So that whatever comes first is a rise, and begins a video.
        self.timestep = float("-inf")

    def set_step(self, step: int | None, steps: int | None = None) -> None:
        """State the step of the forwards to come; None leaves it to the timesteps again, from a new video on.

        steps: how many the video has, which timesteps do not say
        """
        self.given, self.steps = step, steps
        self.video += step == 0
        self.timestep = float("-inf")

    def step_of(self, timestep: Tensor) -> int:
        """The step that a forward with this timestep belongs to."""
        if self.given is not None:
            return self.given
        # Tokens of a frame that is given may have timestep 0, all others have the step's. Waits for the GPU.
        value = timestep.max().item()
        # Guidance branches, and whatever else is run in a step, come with its timestep again.
        if value != self.timestep:
            begins = value > self.timestep
            self.video += begins
            self.step = 0 if begins else self.step + 1
            self.timestep = value
        return self.step
