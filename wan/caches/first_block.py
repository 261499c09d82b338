"""First-block cache: while what the first block adds changes little, the others add what they added last."""

from __future__ import annotations

import torch
from diffusers import FirstBlockCacheConfig, ModelMixin
from diffusers.hooks import HookRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK, FBCHeadBlockHook
from diffusers.hooks.hooks import StateManager
from torch import Tensor, nn

from wan.attention.spec import TransformerSpec
from wan.caches.base import StepCache
from wan.config.cache_settings import CacheSettings
from wan.parallel.collectives import all_gather
from wan.parallel.sequence_parallel import sequence_parallel_of


class FirstBlockCache(StepCache):
    config_class, hook, leading = FirstBlockCacheConfig, _FBC_LEADER_BLOCK_HOOK, 1

    def __init__(self, transformer: ModelMixin, settings: CacheSettings, spec: TransformerSpec):
        super().__init__(transformer, settings, spec)
        transformer.enable_cache(FirstBlockCacheConfig(settings.threshold))
        registry = HookRegistry.check_if_exists_or_initialize(self.blocks[0])
        self.decision = SharedDecision(self.leader(self.blocks[0]).state_manager, settings, transformer)
        # In place of diffusers' own, with the same states, by which the hooks of the other blocks go.
        registry.remove_hook(self.hook, recurse=False)
        registry.register_hook(self.decision, self.hook)

    def _prepare(self, steps: int, first: int) -> None:
        self.decision.first = first


class SharedDecision(FBCHeadBlockHook):
    """diffusers' hook of the first block, with a decision that all processes of a sequence share, and its limits."""

    def __init__(self, state_manager: StateManager, settings: CacheSettings, transformer: ModelMixin):
        super().__init__(state_manager, settings.threshold)
        self.max_skips, self.transformer, self.first = settings.max_skips, transformer, 0
        # By guidance branch the step that was computed last; it has one wherever it has a residual.
        self.computed: dict[str, int] = {}

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.computed = {}
        return super().reset_state(module)

    # Reads a number off the GPU, and branches on it, which no graph can hold.
    @torch.compiler.disable
    def _should_compute_remaining_blocks(self, hidden_states_residual: Tensor) -> bool:
        context, before = self.state_manager.context, self.state_manager.get_state().head_block_residual
        # What decides without the tensors is the same on all processes, so that all or none of them exchange sums.
        may_reuse = before is not None and context.step_index >= self.first
        may_reuse = may_reuse and context.step_index - self.computed[context.name] <= self.max_skips
        # Less, not equal, so that threshold 0 reuses nothing even where nothing changes.
        if may_reuse and self._change(hidden_states_residual, before) < self.threshold:
            return False
        self.computed[context.name] = context.step_index
        return True

    def _change(self, residual: Tensor, before: Tensor) -> float:
        """The mean change over all tokens of the sequence, relative to what there was before."""
        # Sums in place of diffusers' means, since processes may have unequal numbers of tokens.
        sums = torch.stack([x.abs().sum(dtype=torch.float32) for x in (residual - before, before)])
        sequence = sequence_parallel_of(self.transformer)
        if sequence is not None:
            # Added up here, in one order: a sum that differs in its last bit would part the processes for good.
            sums = all_gather(sums, sequence.group).sum(0)
        change, size = sums.tolist()
        return change / size if size > 0 else float("inf")
