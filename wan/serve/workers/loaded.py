"""The one pipeline that is loaded, changed to what the next video wants, as little as will do."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterable
from typing import Protocol

import torch

from wan.checkpoints.lora import Adapter
from wan.config.cache_settings import COPIES
from wan.config.settings import Settings, writers_of
from wan.models.attention import apply_attention
from wan.models.checkpoint import Checkpoint
from wan.models.lora import exchange_lora, read_adapters
from wan.parallel.distributed import DistributedContext
from wan.run.request import Options
from wan.run.run import lay_out
from wan.sampling.guided import GuidedPipeline

# What a pipeline takes on without being loaded again; all else that says what runs takes a load.
EXCHANGED = ("attention", "cache", "lora")


class LoadPipeline(Protocol):
    """How a pipeline is loaded for videos of one model, as by `wan.run.generation.load_pipeline`."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        every: list[Settings],
        device: torch.device,
        options: Options,
        processes: DistributedContext | None,
    ) -> GuidedPipeline: ...


class Loaded:
    """A pipeline, or none yet."""

    def __init__(
        self, options: Options, device: torch.device, load: LoadPipeline, processes: DistributedContext | None
    ):
        self.options, self.device, self.load, self.processes = options, device, load, processes
        self.pipe: GuidedPipeline | None = None
        # What it was loaded by, what its plan of memory was made for, and what it was loaded to write.
        self._base: tuple = ()
        self._needs: tuple[int, ...] = ()
        self._writes = False, False
        # The LoRA that it has, and the names of the tensors which that changes.
        self._lora: tuple = ()
        self._changed: set[str] = set()

    def ready(self, checkpoint: Checkpoint, settings: Settings) -> GuidedPipeline:
        """The pipeline for settings: as it is, with another attention, cache or LoRA, or loaded anew.

        Raises as `load_pipeline` does; what is there stays there after an `InputError` for settings.
        """
        if self.processes is not None:
            lay_out(self.processes, checkpoint, [settings], self.options)
        if self.pipe is None or not self._suits(settings):
            return self._load(checkpoint, settings)
        pipe, lora = self.pipe, _files(settings)
        checkpoint.family.require(cache=settings.cache)
        if settings.cache is not None:
            pipe.transformer_spec.check_cache(settings.cache.kind)
        if lora != self._lora:
            adapters = read_adapters(checkpoint, settings.model)
            # Whatever ends this halfway leaves weights that are of neither LoRA.
            self.pipe = None
            if not exchange_lora(pipe, checkpoint, settings.model, adapters, self._changed):
                del pipe
                return self._load(checkpoint, settings)
            self.pipe, self._lora, self._changed = pipe, lora, _changed(adapters)
        _put_on(pipe, settings)
        return pipe

    def _suits(self, settings: Settings) -> bool:
        """Whether the pipeline becomes the one for settings without a load."""
        unable = any(now > then for now, then in zip(writers_of([settings]), self._writes))
        # A plan of memory is for videos up to the one that it was made for.
        outgrown = self.options.memory is not None and any(
            now > then for now, then in zip(_needs(settings), self._needs)
        )
        return _base(settings, self.processes) == self._base and not unable and not outgrown

    def _load(self, checkpoint: Checkpoint, settings: Settings) -> GuidedPipeline:
        # A file that does not fit should not cost the models that are there.
        changed, lora = _changed(read_adapters(checkpoint, settings.model)), _files(settings)
        self.pipe = None
        # Before the next one is loaded, so that two need not fit at once.
        gc.collect()
        torch.cuda.empty_cache()
        self.pipe = self.load(checkpoint, [settings], self.device, self.options, self.processes)
        self._base, self._needs = _base(settings, self.processes), _needs(settings)
        self._writes = writers_of([settings])
        self._lora, self._changed = lora, changed
        return self.pipe


def _put_on(pipe: GuidedPipeline, settings: Settings) -> None:
    """The cache and the attention of settings, if others are there."""
    cache = None if pipe.cache is None else pipe.cache.settings
    if settings.cache != cache:
        # Only where one is asked for, as in `wan.models.pretrained`.
        from wan.caches.apply import apply_cache, remove_cache

        for one in pipe.transformers:
            if settings.cache is None:
                remove_cache(one)
            else:
                apply_cache(one, settings.cache, pipe.transformer_spec)
    if settings.cache != cache or settings.attention != pipe.transformer.nabla.config:
        apply_attention(pipe.transformers, settings.attention)


def _base(settings: Settings, processes: DistributedContext | None) -> tuple:
    layout = None if processes is None else processes.layout
    return (layout, *(value for name, value in vars(settings.model).items() if name not in EXCHANGED))


def _files(settings: Settings) -> tuple:
    """The LoRA of settings, and what tells its files from others that had their names before."""
    found = [(one, os.stat(one.file)) for one in settings.lora]
    return tuple((one, file.st_mtime_ns, file.st_size, file.st_ino) for one, file in found)


def _changed(adapters: Iterable[Adapter]) -> set[str]:
    return {name for adapter in adapters for name in adapter.changes}


def _needs(settings: Settings) -> tuple[int, ...]:
    """What a video needs memory for, beside weights: tokens, pixels of a frame, kept masks, what a cache keeps."""
    video, kept = settings.video, 0 if settings.cache is None else COPIES[settings.cache.kind]
    return math.prod(video.token_grid), math.prod(video.size), int(settings.attention.mask_refresh > 1), kept
