"""MagCache's ratios, measured in videos that are computed in full."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import MagCacheConfig, ModelMixin

from nabla import InputError
from wan.attention.spec import TransformerSpec
from wan.caches.apply import remove_cache
from wan.caches.base import StepCache
from wan.caches.mag import MagCache
from wan.config.cache_settings import CacheSettings


class Calibration(StepCache):
    """Computes everything, and measures ratios meanwhile; put on by `calibrated`."""

    config_class, hook = MagCacheConfig, MagCache.hook

    def __init__(self, transformer: ModelMixin, spec: TransformerSpec):
        # Settings need ratios, which are not looked at here.
        super().__init__(transformer, CacheSettings("mag", ratios=(1.0,)), spec)
        self.config = MagCacheConfig(calibrate=True)
        transformer.enable_cache(self.config)
        self.measured: list[list[float]] = []

    def _prepare(self, steps: int, first: int) -> None:
        # After its last step diffusers prints the ratios and forgets them, so it is told of one more than there are.
        self.config.num_inference_steps = steps + 1

    def end(self) -> None:
        states = self.leader(self.blocks[0]).state_manager._state_cache
        self.measured += [state.calibration_ratios for state in states.values()]
        super().end()

    def means(self) -> list[float]:
        """The mean over all branches of all videos, a ratio for each step in which the transformer ran."""
        # (branches of all videos, steps). The first ratio of each is 1, for there is no step before it.
        return torch.tensor(self.measured, dtype=torch.float64).mean(0).tolist() if self.measured else []


class Calibrations:
    """Those of transformers that each run some steps of a video, in the order in which they do."""

    def __init__(self, every: Sequence[Calibration]):
        self.every = every

    def ratios(self) -> list[float]:
        """A ratio a step of the video. Raises `InputError` for any not finite."""
        ratios = [ratio for one in self.every for ratio in one.means()]
        if not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
            raise InputError("the ratios are not positive finite numbers; the checkpoint's blocks add nothing")
        return ratios


@contextmanager
def calibrated(transformers: Sequence[ModelMixin], spec: TransformerSpec) -> Iterator[Calibrations]:
    """Measure MagCache's ratios in the videos that are sampled within, all of as many steps.

    transformers: of a pipeline, in the order in which they run
    """
    try:
        every = []
        for one in transformers:
            remove_cache(one)
            one.step_cache = calibration = Calibration(one, spec)
            every.append(calibration)
        yield Calibrations(every)
    finally:
        for one in transformers:
            remove_cache(one)
