"""Whoever wants to know what a pipeline's `generate` is doing, while it does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from wan.attention.spec import TransformerSpec
from wan.parallel.distributed import DistributedContext

if TYPE_CHECKING:
    from wan.caches.base import StepCache
    from wan.config.settings import SamplingSettings, VideoSettings


class ObservedPipeline(Protocol):
    """What an observer may look at of the pipeline that makes a video."""

    @property
    def transformer(self) -> nn.Module: ...
    @property
    def transformers(self) -> tuple[nn.Module, ...]: ...
    @property
    def transformer_spec(self) -> TransformerSpec: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def distributed(self) -> DistributedContext | None: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def cache(self) -> StepCache | None: ...


class Observer:
    """Is told what happens, and does nothing; override what is of interest.

    What it raises, such as `wan.sampling.loop.Cancelled`, ends the video and leaves the pipeline ready for another.
    Processes that share a video must all have an observer of the same kind, or none.
    """

    def video(
        self, pipe: ObservedPipeline, prompt: str, video: VideoSettings, sampling: SamplingSettings
    ) -> AbstractContextManager:
        """Entered before a video with these settings, and left when it is there, or on an error."""
        return nullcontext()

    def stage_begins(self, name: str) -> None:
        """A stage begins: "text", "sampling", or "decode" on the leader."""

    def stage_ends(self, name: str, seconds: float) -> None:
        """A stage has ended, and the device is done with it."""

    def sampling(self, pipe: ObservedPipeline, sampling: SamplingSettings, latents: Tensor) -> AbstractContextManager:
        """Entered before the first step from noise (B, C, T, h, w), and left after the last one, or on an error."""
        return nullcontext()

    def step_begins(self, step: int) -> None:
        """A sampling step begins, from 0. A GPU may still be at an earlier one."""

    def step_ends(self, step: int, clean: Tensor) -> None:
        """A sampling step has been asked for; `clean` are the latents (B, C, T, h, w) at the end that it predicts."""


class Observers(Observer):
    """Several as one, told in order."""

    def __init__(self, *observers: Observer):
        self.observers = observers

    @contextmanager
    def video(
        self, pipe: ObservedPipeline, prompt: str, video: VideoSettings, sampling: SamplingSettings
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for one in self.observers:
                stack.enter_context(one.video(pipe, prompt, video, sampling))
            yield

    def stage_begins(self, name: str) -> None:
        for one in self.observers:
            one.stage_begins(name)

    def stage_ends(self, name: str, seconds: float) -> None:
        for one in self.observers:
            one.stage_ends(name, seconds)

    @contextmanager
    def sampling(self, pipe: ObservedPipeline, sampling: SamplingSettings, latents: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for one in self.observers:
                stack.enter_context(one.sampling(pipe, sampling, latents))
            yield

    def step_begins(self, step: int) -> None:
        for one in self.observers:
            one.step_begins(step)

    def step_ends(self, step: int, clean: Tensor) -> None:
        for one in self.observers:
            one.step_ends(step, clean)
