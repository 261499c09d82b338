"""TaylorSeer (arXiv 2503.06923): between computed steps the last layer's output goes on along a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry
from diffusers.hooks.taylorseer_cache import _TAYLORSEER_CACHE_HOOK
from torch import nn

from wan.attention.spec import TransformerSpec
from wan.caches.base import StepCache
from wan.config.cache_settings import CacheSettings


class TaylorSeer(StepCache):
    """diffusers' light form: no block runs between computed steps. Decides by steps alone, so all processes alike."""

    config_class, hook = TaylorSeerCacheConfig, _TAYLORSEER_CACHE_HOOK

    def __init__(self, transformer: ModelMixin, settings: CacheSettings, spec: TransformerSpec):
        super().__init__(transformer, settings, spec)
        config = TaylorSeerCacheConfig(
            settings.interval,
            # By default diffusers rounds what it keeps to bfloat16, whatever the model's dtype.
            taylor_factors_dtype=torch.float32,
            # What its light form chooses by names that not all families have.
            skip_predict_identifiers=[rf"{blocks.name}\.\d+" for blocks in spec.blocks],
            cache_identifiers=[spec.output],
        )
        transformer.enable_cache(config)
        self.first = 0
        # Blocks give zeros between computed steps; what the output layer gives is what goes on.
        self.hooked = *self.blocks, spec.output_of(transformer)

    @classmethod
    def computes(cls, first_block: nn.Module) -> bool:
        # The hook has no flag for it: it counts a step before it runs the block, and notes the step after it has.
        state = cls.leader(first_block).state_manager.get_state()
        return state.last_update_step == state.current_step

    def _prepare(self, steps: int, first: int) -> None:
        self.first = first

    @contextmanager
    def branch(self, name: str, step: int) -> Iterator[None]:
        with super().branch(name, step):
            self._set_step(step)
            yield

    def _set_step(self, step: int) -> None:
        for module in self.hooked:
            hook = HookRegistry.check_if_exists_or_initialize(module).get_hook(_TAYLORSEER_CACHE_HOOK)
            state = hook.state_manager.get_state()
            # It counts a transformer's own forwards, each as the module is called.
            state.current_step = step - 1
            # Before any step is computed there is nothing to go on from.
            hook.disable_cache_before_step = step + 1 if state.last_update_step is None else max(self.first, 1)
