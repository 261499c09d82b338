"""The state of one self-attention layer: what its next forward is to do. Its processor owns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import nabla
from nabla import Plan
from nabla.attention import ReusableBlockMask
from nabla.rotary import Rotary
from wan.parallel.ulysses import UlyssesAllToAll, ulysses_attend


@dataclass(eq=False)
class LayerState:
    """Set before every forward, outside the blocks, so that these can be compiled: one graph serves all layers, since
    each finds here what another finds in its own.

    heads: of the layer, on all processes together
    plan: None for the attention that was there before
    block_mask: where blocks are written for later steps, or taken from; None to choose them and forget
    all_to_all: where processes share the video
    density: (own heads,) float32, where the share of blocks that each keeps is written, or None
    """

    heads: int
    plan: Plan | None = None
    block_mask: ReusableBlockMask | None = None
    all_to_all: UlyssesAllToAll | None = None
    density: Tensor | None = None

    def send(self, x: Tensor, number: int, rotary: Rotary) -> Any:
        """q, k or v, `number` 0 to 2, (B, own tokens, heads, D), sent to where it is attended to; for `attend`."""
        if self.all_to_all is None:
            return x
        assert self.plan is not None
        return self.all_to_all.send(x, number, self.plan.tokens, rotary)

    def attend(self, sent: list[Any], batch: int, rotary: Rotary) -> Tensor:
        """(B, own tokens, heads, D) of q, k and v that `send` gave."""
        assert self.plan is not None
        if self.all_to_all is None:
            q, k, v = sent
            return nabla.attend(q, k, v, self.plan, rotary, self.block_mask, self.density)
        return ulysses_attend(
            sent, batch, self.heads, self.plan, rotary, self.block_mask, self.density, self.all_to_all
        )
