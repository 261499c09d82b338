"""Step caches: diffusers' hooks that reuse what a transformer's blocks added in an earlier step.

Put on after blocks are compiled, which stay one graph, and before the hooks of diffusers' context parallelism. Each
guidance branch has a state of its own, and none outlives a video.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig, WanTransformer3DModel
from diffusers.hooks import HookRegistry
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK, FBCHeadBlockHook
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.mag_cache import _MAG_CACHE_LEADER_BLOCK_HOOK
from diffusers.hooks.taylorseer_cache import _TAYLORSEER_CACHE_HOOK
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from nabla import InputError
from wan.config.cache_settings import CacheSettings
from wan.parallel.ulysses import all_gather

LEADERS = {
    FirstBlockCacheConfig: _FBC_LEADER_BLOCK_HOOK,
    MagCacheConfig: _MAG_CACHE_LEADER_BLOCK_HOOK,
    TaylorSeerCacheConfig: _TAYLORSEER_CACHE_HOOK,
}


def apply_cache(transformer: WanTransformer3DModel, settings: CacheSettings) -> StepCache:
    """Put a step cache on a transformer, in place; `remove_cache` takes it off. For `WanT2V`, which says the steps."""
    remove_cache(transformer)
    kinds = {"first_block": FirstBlockCache, "mag": MagCache, "taylorseer": TaylorSeer}
    transformer.step_cache = kinds[settings.kind](transformer, settings)
    return transformer.step_cache


def remove_cache(transformer: WanTransformer3DModel) -> None:
    """Take off what `apply_cache` put on, and free what it keeps; nothing happens to others."""
    if hasattr(transformer, "step_cache"):
        # Hooks that are taken off live on, in reference cycles, until Python looks for those.
        transformer._reset_stateful_cache()
        transformer.disable_cache()
        del transformer.step_cache


def ran_in_full(transformer: WanTransformer3DModel) -> bool:
    """Whether all blocks run in a forward, its first one done or all of it, rather than a cache in their place.

    Raises `InputError` for a cache of diffusers that does not say.
    """
    config = getattr(transformer, "_cache_config", None)
    if config is None:
        return True
    by_steps = isinstance(config, TaylorSeerCacheConfig)
    if type(config) not in LEADERS or (by_steps and not config.use_lite_mode):
        known = " or ".join(kind.__name__ for kind in LEADERS)
        raise InputError(f"{type(config).__name__} does not say which blocks it leaves out; use {known} in lite mode")
    state = _leader(transformer, config).state_manager.get_state()
    return state.last_update_step == state.current_step if by_steps else state.should_compute


def blocks_left_out(transformer: nn.Module) -> bool:
    """Whether a step cache, if there is one, stands in for the blocks after the first of the forward that runs."""
    return getattr(transformer, "step_cache", None) is not None and not ran_in_full(transformer)


class StepCache:
    """What `apply_cache` leaves on a transformer.

    forwards, reused: how many there were in the last video, and how many of them took what an earlier one computed
    leading: how many of the first blocks run in these too
    """

    leading = 0

    def __init__(self, transformer: WanTransformer3DModel, settings: CacheSettings):
        if len(transformer.blocks) < 2:
            raise InputError("a cache needs a transformer of 2 blocks or more; leave it out")
        self.transformer, self.settings = transformer, settings
        self.forwards = self.reused = 0
        block = type(transformer.blocks[0])
        if block is not WanTransformerBlock:
            # FSDP makes a class of its own, which diffusers does not know.
            TransformerBlockRegistry.register(block, replace(TransformerBlockRegistry.get(WanTransformerBlock)))

    def begin(self, steps: int, dense_steps: int) -> None:
        """Forget the last video, however it ended, and prepare for one of so many steps."""
        self.transformer._reset_stateful_cache()
        self.forwards = self.reused = 0
        self._prepare(steps, min(steps, max(round(self.settings.warmup * steps), dense_steps)))

    def _prepare(self, steps: int, first: int) -> None:
        """Take note of a video's steps, of which the first so many are computed in any case."""
        raise NotImplementedError

    @contextmanager
    def branch(self, name: str, step: int) -> Iterator[None]:
        """Around the forward of a guidance branch."""
        with self.transformer.cache_context(name, step_index=step):
            yield
            self.forwards += 1
            self.reused += not ran_in_full(self.transformer)

    def end(self) -> None:
        """Free what is kept."""
        self.transformer._reset_stateful_cache()

    def describe(self) -> str:
        return f"{self.settings.describe()}, {self.reused} of {self.forwards} forwards reused"


class FirstBlockCache(StepCache):
    leading = 1

    def __init__(self, transformer: WanTransformer3DModel, settings: CacheSettings):
        super().__init__(transformer, settings)
        config = FirstBlockCacheConfig(settings.threshold)
        transformer.enable_cache(config)
        registry = HookRegistry.check_if_exists_or_initialize(transformer.blocks[0])
        self.leader = SharedDecision(_leader(transformer, config).state_manager, settings, transformer)
        registry.remove_hook(_FBC_LEADER_BLOCK_HOOK, recurse=False)
        registry.register_hook(self.leader, _FBC_LEADER_BLOCK_HOOK)

    def _prepare(self, steps: int, first: int) -> None:
        self.leader.first = first


class SharedDecision(FBCHeadBlockHook):
    """diffusers' hook of the first block, with a decision that all processes of a sequence share, and its limits."""

    def __init__(self, state_manager: StateManager, settings: CacheSettings, transformer: WanTransformer3DModel):
        super().__init__(state_manager, settings.threshold)
        self.max_skips, self.transformer, self.first = settings.max_skips, transformer, 0
        self.computed: dict[str, int] = {}

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.computed = {}
        return super().reset_state(module)

    @torch.compiler.disable
    def _should_compute_remaining_blocks(self, hidden_states_residual: Tensor) -> bool:
        context, before = self.state_manager.context, self.state_manager.get_state().head_block_residual
        # What decides without the tensors is the same on all processes, so that all or none of them exchange sums.
        may_reuse = before is not None and context.step_index >= self.first
        may_reuse = may_reuse and context.step_index - self.computed[context.name] <= self.max_skips
        if may_reuse and self._change(hidden_states_residual, before) < self.threshold:
            return False
        self.computed[context.name] = context.step_index
        return True

    def _change(self, residual: Tensor, before: Tensor) -> float:
        """The mean change over all tokens of the sequence, relative to what there was before."""
        sums = torch.stack([x.abs().sum(dtype=torch.float32) for x in (residual - before, before)])
        sequence = getattr(self.transformer, "sequence", None)
        if sequence is not None:
            # Added up here, in one order: a sum that differs in its last bit would part the processes for good.
            sums = all_gather(sums, sequence.group).sum(0)
        change, size = sums.tolist()
        return change / size if size > 0 else float("inf")


class MagCache(StepCache):
    """Decides by ratios and steps alone, so that all processes decide alike."""

    def __init__(self, transformer: WanTransformer3DModel, settings: CacheSettings):
        super().__init__(transformer, settings)
        self.config = MagCacheConfig(mag_ratios=list(settings.ratios), num_inference_steps=len(settings.ratios))
        transformer.enable_cache(self.config)

    def _prepare(self, steps: int, first: int) -> None:
        own = self.settings
        config = MagCacheConfig(
            threshold=own.threshold,
            # A ratio of just 1 predicts no error at all.
            max_skip_steps=own.max_skips if own.threshold > 0 else 0,
            retention_ratio=first / steps,
            num_inference_steps=steps,
            mag_ratios=list(own.ratios),
        )
        # The hooks share this one; to put on new ones would change the order of hooks.
        vars(self.config).update(vars(config))


class TaylorSeer(StepCache):
    """diffusers' light form: no block runs between computed steps. Decides by steps alone, so all processes alike."""

    def __init__(self, transformer: WanTransformer3DModel, settings: CacheSettings):
        super().__init__(transformer, settings)
        config = TaylorSeerCacheConfig(settings.interval, taylor_factors_dtype=torch.float32, use_lite_mode=True)
        transformer.enable_cache(config)

    def _prepare(self, steps: int, first: int) -> None:
        for module in (*self.transformer.blocks, self.transformer.proj_out):
            hook = HookRegistry.check_if_exists_or_initialize(module).get_hook(_TAYLORSEER_CACHE_HOOK)
            # Before any step is computed there is nothing to go on from.
            hook.disable_cache_before_step = max(first, 1)


class Calibration(StepCache):
    """Computes everything, and measures MagCache's ratios meanwhile; put on by `calibrated`."""

    def __init__(self, transformer: WanTransformer3DModel):
        super().__init__(transformer, CacheSettings("mag", ratios=(1.0,)))
        self.config = MagCacheConfig(calibrate=True)
        transformer.enable_cache(self.config)
        self.measured: list[list[float]] = []

    def _prepare(self, steps: int, first: int) -> None:
        # After its last step diffusers prints and forgets.
        self.config.num_inference_steps = steps + 1

    def end(self) -> None:
        states = _leader(self.transformer, self.config).state_manager._state_cache
        self.measured += [state.calibration_ratios for state in states.values()]
        super().end()

    def ratios(self) -> list[float]:
        """The mean over all branches of all videos, a ratio a step. Raises `InputError` for any not finite."""
        means = torch.tensor(self.measured, dtype=torch.float64).mean(0)
        if not means.isfinite().all() or not (means > 0).all():
            raise InputError("the ratios are not positive finite numbers; the checkpoint's blocks add nothing")
        return means.tolist()


@contextmanager
def calibrated(transformer: WanTransformer3DModel) -> Iterator[Calibration]:
    """Measure MagCache's ratios in the videos that are sampled within, all of as many steps."""
    remove_cache(transformer)
    transformer.step_cache = Calibration(transformer)
    try:
        yield transformer.step_cache
    finally:
        remove_cache(transformer)


def _leader(transformer: WanTransformer3DModel, config: Any) -> Any:
    return HookRegistry.check_if_exists_or_initialize(transformer.blocks[0]).get_hook(LEADERS[type(config)])
