"""Step caches put on a transformer, and taken off. Another kind is a file with a `StepCache`, and a line in `KINDS`."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin

from nabla import InputError
from wan.attention.spec import TransformerSpec
from wan.caches.applied import step_cache_of
from wan.caches.base import StepCache
from wan.caches.first_block import FirstBlockCache
from wan.caches.mag import MagCache
from wan.caches.taylorseer import TaylorSeer
from wan.config.cache_settings import CacheSettings

KINDS: dict[str, type[StepCache]] = {"first_block": FirstBlockCache, "mag": MagCache, "taylorseer": TaylorSeer}


def apply_cache(transformer: ModelMixin, settings: CacheSettings, spec: TransformerSpec) -> StepCache:
    """Put a step cache on a transformer, in place; `remove_cache` takes it off. The sampling loop says the steps."""
    remove_cache(transformer)
    transformer.step_cache = cache = KINDS[settings.kind](transformer, settings, spec)
    return cache


def remove_cache(transformer: ModelMixin) -> None:
    """Take off what `apply_cache` put on, and free what it keeps; nothing happens to others."""
    if step_cache_of(transformer) is not None:
        # Emptied first: hooks that are taken off live on, in reference cycles, until Python looks for those.
        transformer._reset_stateful_cache()
        transformer.disable_cache()
        del transformer.step_cache


def kind_of(config: Any) -> type[StepCache]:
    """The cache of a configuration of diffusers; raises `InputError` for one that does not say what it leaves out."""
    for kind in KINDS.values():
        # Without its light form TaylorSeer runs the blocks, and leaves out layers within them.
        if type(config) is kind.config_class and getattr(config, "use_lite_mode", True):
            return kind
    known = " or ".join(kind.config_class.__name__ for kind in KINDS.values())
    raise InputError(f"{type(config).__name__} does not say which blocks it leaves out; use {known} in lite mode")
