"""MagCache (arXiv 2506.09045): ratios measured beforehand predict how what blocks add changes from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import MagCacheConfig, ModelMixin
from diffusers.hooks.mag_cache import _MAG_CACHE_LEADER_BLOCK_HOOK

from wan.attention.spec import TransformerSpec
from wan.caches.base import StepCache
from wan.config.cache_settings import CacheSettings


class MagCache(StepCache):
    """Decides by ratios and steps alone, so that all processes decide alike."""

    config_class, hook = MagCacheConfig, _MAG_CACHE_LEADER_BLOCK_HOOK

    def __init__(self, transformer: ModelMixin, settings: CacheSettings, spec: TransformerSpec):
        super().__init__(transformer, settings, spec)
        # As its settings were checked.
        assert settings.ratios is not None
        # As many steps as ratios, so that none are interpolated before a video's steps are known.
        self.config = MagCacheConfig(mag_ratios=list(settings.ratios), num_inference_steps=len(settings.ratios))
        transformer.enable_cache(self.config)

    def _prepare(self, steps: int, first: int) -> None:
        own = self.settings
        assert own.ratios is not None and own.threshold is not None and own.max_skips is not None
        config = MagCacheConfig(
            threshold=own.threshold,
            # A ratio of just 1 predicts no error at all.
            max_skip_steps=own.max_skips if own.threshold > 0 else 0,
            # diffusers multiplies by the steps again, and rounds.
            retention_ratio=first / steps,
            num_inference_steps=steps,
            mag_ratios=list(own.ratios),
        )
        # The hooks share this one; to put on new ones would change the order of hooks.
        vars(self.config).update(vars(config))

    @contextmanager
    def branch(self, name: str, step: int) -> Iterator[None]:
        with super().branch(name, step):
            # diffusers counts a transformer's own forwards, and ratios are those of the video's steps.
            self.leader(self.blocks[0]).state_manager.get_state().step_index = step
            yield
