"""Blocks that layers choose in one sampling step and take again in the next ones (`mask_refresh`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nabla import Plan
from nabla.attention import ReusableBlockMask
from wan.attention.layer import LayerState


class Choice(NamedTuple):
    """The forward in which blocks are chosen: others may take them in the same video, with the same plans and batch.

    plans: of each layer, None where it runs dense
    """

    video: int
    step: int
    plans: tuple[Plan | None, ...]
    batch: int

    def serves(self, now: Choice, refresh: int) -> bool:
        """Whether its blocks are good for the forward `now`."""
        # Plans compare by identity, and `Plans` makes one for a config, size, device and dtype. Where that of one layer
        # is another one, as where a stretch of steps ends, all choose anew, so that all are of one forward.
        return self == now._replace(step=self.step) and self.step <= now.step < self.step + refresh


class MaskCache:
    """Says of each forward whether it chooses its blocks or takes those of the forward that chose last.

    refresh: steps that blocks serve for, that in which they are chosen included
    """

    def __init__(self, refresh: int):
        self.refresh = refresh
        self.chosen: Choice | None = None
        # Of a forward that has begun: it has chosen for all layers only when it has come to its end.
        self.choosing: Choice | None = None

    def prepare(self, layers: Sequence[LayerState], now: Choice) -> bool:
        """Set the block masks of layers for a forward, which has a plan for each; whether it takes blocks over."""
        last = self.chosen
        if last is not None and last.serves(now, self.refresh):
            for layer in layers:
                if layer.block_mask is not None:
                    layer.block_mask = layer.block_mask._replace(reuse=True)
            return True
        # Until all layers have chosen, nobody may take what is there: a forward that raises leaves a mixture.
        self.chosen, self.choosing = None, now
        for layer, plan in zip(layers, now.plans, strict=True):
            layer.block_mask = None if plan is None else _empty_mask(layer, plan, now.batch)
        return False

    def complete(self) -> None:
        """All layers have chosen, or have taken what was there."""
        self.chosen, self.choosing = self.choosing or self.chosen, None

    def abandon(self) -> None:
        """What is being chosen is not for all layers."""
        self.choosing = None

    def clear(self, layers: Sequence[LayerState]) -> None:
        """Free all blocks."""
        self.chosen = self.choosing = None
        for layer in layers:
            layer.block_mask = None


def _empty_mask(layer: LayerState, plan: Plan, batch: int) -> ReusableBlockMask:
    """Memory to write blocks to, that of before if it has the size."""
    assert plan.selection is not None
    layout = plan.selection.layout
    heads = layer.all_to_all.own_heads(layer.heads) if layer.all_to_all else layer.heads
    shape, device = (batch, heads, layout.blocks, layout.blocks), layout.sizes.device
    mask = layer.block_mask
    if mask is not None and mask.mask.shape == shape and mask.mask.device == device:
        return mask._replace(reuse=False)
    # A forward in inference mode would make a tensor that a later one outside of it could not write to.
    with torch.inference_mode(False):
        return ReusableBlockMask(torch.empty(shape, dtype=torch.bool, device=device), reuse=False)
