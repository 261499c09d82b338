"""What step caches make of the latents of two processes, against one process with the same cache; see layouts.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import wan.caches.first_block
from nabla import NablaConfig
from wan import WanT2V
from wan.caches.apply import apply_cache
from wan.caches.first_block import SharedDecision
from wan.config.cache_settings import CacheSettings
from wan.models.wan.processor import TRANSFORMER
from wan.parallel.distributed import DistributedContext
from wan.parallel.layout import ParallelLayout

ATTENTION = NablaConfig(threshold=0.4, dense_steps=1)
STEPS = 6
FIRST = CacheSettings("first_block", 1e6, warmup=0, max_skips=2)
TAYLORSEER = CacheSettings("taylorseer", interval=3, warmup=0)
MAG = CacheSettings("mag", 1e6, warmup=0, max_skips=2, ratios=(1.0, 1.1, 0.9, 1.1, 0.9, 1.1))


def cases(distributed: DistributedContext, checkpoint: Path) -> Iterator[dict[str, object]]:
    """For each, on the first process the error of latents, and on all how many forwards reused."""
    for layout in (ParallelLayout(ulysses=2), ParallelLayout(cfg=2)):
        for sharded in (False, True):
            distributed.init_meshes(layout)
            form = {"dit_fsdp": sharded, "t5_fsdp": sharded}
            pipe = WanT2V.from_pretrained(checkpoint, ATTENTION, processes=distributed, **form)
            alone = partial(WanT2V.from_pretrained, checkpoint, ATTENTION)
            for settings in (FIRST, MAG, TAYLORSEER):
                yield compare(distributed, pipe, alone, settings, sample) | {"sharded": sharded}
            if layout.ulysses == 2:
                yield compare(distributed, pipe, alone, between(pipe), sample) | {"disagree": True}


def compare(
    distributed: DistributedContext,
    pipe: Any,
    load_alone: Callable[..., Any],
    settings: CacheSettings,
    sample: Callable[[Any], torch.Tensor],
) -> dict[str, object]:
    """load_alone: loads for one process, given a cache by its name; sample: gives the latents of a pipeline"""
    cache = apply_cache(pipe.transformer, settings, pipe.transformer_spec)
    latents = [sample(pipe) for _ in range(2)][1]
    found = {"kind": settings.kind, "cfg": distributed.layout.cfg, "reused": cache.reused, "forwards": cache.forwards}
    if distributed.rank > 0:
        return found
    alone = load_alone(cache=settings)
    exact = sample(alone)
    error = (latents - exact).abs().max() / exact.abs().max()
    return found | {"error": error.item(), "alone": [alone.cache.reused, alone.cache.forwards]}


def between(pipe: WanT2V) -> CacheSettings:
    """A threshold between what each process sees of the first change by itself, so that alone they would disagree."""
    seen = []

    def watched(sums: torch.Tensor, group: object) -> torch.Tensor:
        gathered = original(sums, group)
        seen.append((gathered[:, 0] / gathered[:, 1]).tolist())
        return gathered

    cache = apply_cache(pipe.transformer, CacheSettings("first_block", 0, warmup=0), TRANSFORMER)
    assert isinstance(cache.decision, SharedDecision)
    original, wan.caches.first_block.all_gather = wan.caches.first_block.all_gather, watched
    try:
        sample(pipe)
    finally:
        wan.caches.first_block.all_gather = original
    low, high = sorted(seen[0])
    assert low < high
    return CacheSettings("first_block", low + 0.3 * (high - low), warmup=0)


def sample(pipe: WanT2V) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    own = pipe.transformer.config
    # Less noise in the lower half, whose tokens are the second process's, so that both see other changes.
    noise = torch.randn(1, own.in_channels, 2, 18, 22, generator=generator)
    noise[:, :, 1] *= 0.5
    texts = torch.randn(2, 7, own.text_dim, generator=generator).split(1)
    return pipe.sample(*texts, noise=noise, steps=STEPS)
