"""Which step cache a transformer runs with, for those who need not know what it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from wan.caches.base import StepCache


def step_cache_of(transformer: nn.Module) -> StepCache | None:
    """What `wan.caches.apply.apply_cache` left on a transformer."""
    return getattr(transformer, "step_cache", None)


def reuse_of(transformers: Iterable[nn.Module]) -> tuple[int, int]:
    """How many forwards the last video had, and how many of them took what an earlier one computed."""
    caches = [cache for one in transformers if (cache := step_cache_of(one)) is not None]
    return sum(cache.forwards for cache in caches), sum(cache.reused for cache in caches)
