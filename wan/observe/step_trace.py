"""What is seen of a sampling step: moments, spans between them, densities of block masks, samples of these."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = "block"
DENSE = "sdpa"


class Timestamp(NamedTuple):
    """A moment: of a GPU's work, or of the clock."""

    event: torch.cuda.Event | None
    seconds: float

    @classmethod
    def now(cls, device: torch.device) -> Timestamp:
        if device.type != "cuda":
            return cls(None, time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        # Not the time of this call: that at which the stream comes to it, behind the work that was asked for before.
        event.record(torch.cuda.current_stream(device))
        return cls(event, 0.0)

    def wait(self) -> None:
        """Until the device has come to it."""
        if self.event is not None:
            self.event.synchronize()

    def milliseconds_to(self, end: Timestamp) -> float:
        """Only after the device has come to `end`."""
        if self.event is None or end.event is None:
            return 1000 * (end.seconds - self.seconds)
        return self.event.elapsed_time(end.event)


class Span(NamedTuple):
    """A part of a layer's work, `BLOCK` or one that `nabla.probe` names, from a moment to another."""

    layer: int
    part: str
    start: Timestamp
    end: Timestamp


class MaskExample(NamedTuple):
    """The blocks that a head keeps in a step's first forward, (N, N) bool, and their density.

    head: None for all of them alike
    """

    step: int
    layer: int
    head: int | None
    density: float
    blocks: np.ndarray


class MaskSample(NamedTuple):
    """Heads that were attended to together, of which these keep least and most blocks.

    before: how many of the layer's own heads came before them; own: the numbers of all own heads, None if they are all
    heads; heads, densities: of the two, among those together; blocks: theirs, (2, N, N) bool; alike: whether it is a
    window alone, the same for all heads
    """

    layer: int
    before: int
    own: Tensor | None
    heads: Tensor
    densities: Tensor
    blocks: Tensor
    alike: bool


@dataclass
class StepTrace:
    """What was seen of one step on the device, while it may still be at work; tensors and times are to be
    read after `wait` alone.

    expert: which of several transformers ran in it; None where there is one
    densities: of each forward (layers, heads), zero where others have the head or the layer did not run; (layers, 1) if
        all are dense
    kernels: by layer
    reused_masks: by forward that attended sparsely, whether its blocks are those of an earlier one
    host_densities: (forwards, layers, heads) on their way to the host; None if all layers are dense
    """

    step: int
    start: Timestamp
    expert: str | None = None
    end: Timestamp | None = None
    densities: list[Tensor] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    reused_masks: list[bool] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    mask_samples: list[MaskSample] = field(default_factory=list)
    host_densities: Tensor | None = None
    memory: dict[str, float] = field(default_factory=dict)

    def wait(self) -> None:
        """Until the device is done with the step, which has ended here."""
        self._ended.wait()

    def milliseconds(self) -> float:
        """What the device took for the step, once it is done with it."""
        return self.start.milliseconds_to(self._ended)

    @property
    def _ended(self) -> Timestamp:
        assert self.end is not None, f"step {self.step} has not ended"
        return self.end
