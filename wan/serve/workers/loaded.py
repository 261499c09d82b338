"""The one pipeline that is loaded, changed to what the next video wants, as little as will do."""

from __future__ import annotations

import gc
import math
from typing import Protocol

import torch

from wan.checkpoints.lora import read_lora
from wan.config.settings import Settings, writers_of
from wan.models.attention import apply_attention
from wan.models.checkpoint import Checkpoint
from wan.run.request import Options
from wan.sampling.guided import GuidedPipeline


class LoadPipeline(Protocol):
    """How a pipeline is loaded for videos of one model, as by `wan.run.generation.load_pipeline`."""

    def __call__(
        self, checkpoint: Checkpoint, every: list[Settings], device: torch.device, options: Options
    ) -> GuidedPipeline: ...


class Loaded:
    """A pipeline, or none yet."""

    def __init__(self, options: Options, device: torch.device, load: LoadPipeline):
        self.options, self.device, self.load = options, device, load
        self.pipe: GuidedPipeline | None = None
        self._weights: tuple = ()
        # What the pipeline's plan of memory was made for, see `_needs`, and what it was loaded to write.
        self._planned = 0, 0, False
        self._writes = False, False

    def ready(self, checkpoint: Checkpoint, settings: Settings) -> GuidedPipeline:
        """The pipeline for settings: as it is, with another attention, or loaded anew.

        A plan of memory is for videos up to the one that it was made for. Raises as `load_pipeline` does.
        """
        # All that takes a new load to change; attention can be exchanged in place.
        weights = tuple(value for name, value in vars(settings.model).items() if name != "attention")
        needs, writes = _needs(settings), writers_of([settings])
        unable = any(now > then for now, then in zip(writes, self._writes))
        outgrown = self.options.memory is not None and any(now > then for now, then in zip(needs, self._planned))
        if self.pipe is None or weights != self._weights or outgrown or unable:
            _check_lora(checkpoint, settings)
            self.pipe = None
            # Before the next one is loaded, so that two need not fit at once.
            gc.collect()
            torch.cuda.empty_cache()
            self.pipe = self.load(checkpoint, [settings], self.device, self.options)
            self._weights, self._planned, self._writes = weights, needs, writes
        elif settings.attention != self.pipe.transformer.nabla.config:
            apply_attention(self.pipe.transformers, settings.attention)
        return self.pipe


def _check_lora(checkpoint: Checkpoint, settings: Settings) -> None:
    """Raise `InputError` for a LoRA that does not fit, which should not cost the models that are there."""
    if settings.lora:
        kind = checkpoint.family.load_pipeline(checkpoint.layout)
        model = kind.transformer_component(checkpoint, settings.model.transformer_files.get(None)).model
        for file in settings.lora:
            read_lora(file, model, checkpoint.family.naming)


def _needs(settings: Settings) -> tuple[int, int, bool]:
    """What a video needs memory for, beside weights: tokens, pixels of a frame, whether masks are kept."""
    video = settings.video
    return math.prod(video.token_grid), math.prod(video.size), settings.attention.mask_refresh > 1
