"""Which step cache a transformer runs with, for those who need not know what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from wan.caches.base import StepCache


def step_cache_of(transformer: nn.Module) -> StepCache | None:
    """What `wan.caches.apply.apply_cache` left on a transformer."""
    return getattr(transformer, "step_cache", None)
