"""Which expert of a pipeline runs in which step: those of several transformers that each have some of the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from wan.config.model_settings import EXPERTS
from wan.memory.placement import Experts, experts_on_device
from wan.sampling.loop import forget_video
from wan.sampling.solvers import TRAIN_TIMESTEPS


class WalkedPipeline(Protocol):
    """running: the transformer that `predict` calls"""

    running: nn.Module
    offload: bool

    @property
    def transformers(self) -> tuple[nn.Module, ...]: ...
    @property
    def device(self) -> torch.device: ...


def experts_of(timesteps: Tensor, boundary: float | None) -> list[int]:
    """By step the place among a pipeline's transformers of the one that runs in it.

    boundary: share of all timesteps from which on, itself included, the first one runs; None where there is one alone
    """
    if boundary is None:
        return [0] * len(timesteps)
    return [int(timestep < boundary * TRAIN_TIMESTEPS) for timestep in timesteps.tolist()]


class ExpertSteps:
    """What `expert_steps` gives; experts: those on their device; forwards: how many a step runs."""

    def __init__(self, pipe: WalkedPipeline, experts: Experts, numbers: Sequence[int], forwards: Callable[[int], int]):
        self.pipe, self.experts, self.numbers, self.forwards = pipe, experts, numbers, forwards

    def begin(self, step: int) -> None:
        """Before the first forward of a step; of the first step it may be told twice."""
        number, before = self.numbers[step], self.numbers[max(step - 1, 0)]
        if number != before:
            # First, for what it keeps may be as large as what comes.
            forget_video(self.pipe.transformers[before])
        self.pipe.running = self.experts.turn_to(number)
        after = self.numbers[min(step + 1, len(self.numbers) - 1)]
        if after != number:
            self.experts.prepare(after, self.forwards(step))

    def is_first(self, step: int) -> bool:
        """Whether an expert runs for the first time in a step."""
        return step == 0 or self.numbers[step] != self.numbers[step - 1]

    def name(self, step: int) -> str | None:
        """Of the expert of a step, as settings name it; None where there is one transformer for all."""
        return EXPERTS[self.numbers[step]] if len(self.pipe.transformers) > 1 else None


@contextmanager
def expert_steps(pipe: WalkedPipeline, numbers: Sequence[int], forwards: Callable[[int], int]) -> Iterator[ExpertSteps]:
    """What brings the expert of each step where it runs, as the pipeline's `running`, and frees what others keep.

    numbers: by step, as of `experts_of`; forwards: how many a step runs
    """
    with experts_on_device(pipe.transformers, pipe.device, pipe.offload) as experts:
        try:
            yield ExpertSteps(pipe, experts, numbers, forwards)
        finally:
            pipe.running = pipe.transformers[0]
