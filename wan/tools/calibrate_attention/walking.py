"""Walks of a pipeline from noise to latents, whose forwards are looked at on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from wan.config.settings import Settings
from wan.observe.observer import Observer
from wan.run.inputs import open_inputs
from wan.sampling.guided import GuidedPipeline
from wan.sampling.loop import Cancelled
from wan.tools.calibrate_attention.sensitivity import Rerun

# Given the step, which of its forwards this is, and the forward, gives its velocity.
Look = Callable[[int, int, Rerun], Tensor]


class Walker(Observer):
    """Walks a video's steps, and ends behind the last one that is of interest.

    look: runs each forward
    last: the step behind which it ends; decodes: whether the video is decoded after all steps
    calls: how many forwards each step had; seconds: of the stages that came to their end
    """

    def __init__(self, pipe: GuidedPipeline, look: Look, last: int, decodes: bool = False):
        self.pipe, self.look, self.last, self.decodes = pipe, look, last, decodes
        self.step = 0
        self.calls: dict[int, int] = {}
        self.seconds: dict[str, float] = {}

    def walk(self, settings: Settings, steps: int) -> None:
        """Sample the video of settings in so many steps."""
        made = settings.video.to_dict() | replace(settings.sampling, steps=steps).to_dict()
        del made["fps"]
        inputs, _ = open_inputs(settings)
        with self._looked_at(), suppress(Cancelled):
            self.pipe.generate(settings.text, observer=self, **made, **inputs)

    def step_begins(self, step: int) -> None:
        if step > self.last and not self.decodes:
            raise Cancelled
        self.step, self.calls[step] = step, 0

    def stage_begins(self, name: str) -> None:
        if name == "decode" and not self.decodes:
            raise Cancelled

    def stage_ends(self, name: str, seconds: float) -> None:
        self.seconds[name] = seconds

    @contextmanager
    def _looked_at(self) -> Iterator[None]:
        """Have the pipeline's forwards go through `look`."""
        predict = self.pipe.predict

        def looked_at(latents: Tensor, timestep: Tensor, conditions: Any) -> Tensor:
            branch = self.calls[self.step]
            self.calls[self.step] += 1
            # By its inputs, for it is run again with some of its blocks left out, or sparse.
            return self.look(self.step, branch, partial(predict, latents, timestep, conditions))

        # In front of the class's own; what samples asks the pipeline for it.
        vars(self.pipe)["predict"] = looked_at
        try:
            yield
        finally:
            del vars(self.pipe)["predict"]
