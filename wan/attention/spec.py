"""What the machinery has to know of a model family's transformer: where its parts are, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from nabla import InputError

if TYPE_CHECKING:
    from wan.attention.layer import LayerState


class ForwardInputs(NamedTuple):
    """What a transformer is called with.

    grid: (frames, rows, columns) of the tokens; timestep: (B,), or (B, tokens) where each has its own
    dtype: of the latents
    """

    grid: tuple[int, int, int]
    timestep: Tensor
    batch: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class TransformerSpec:
    """A family's transformer, as diffusers has it. Everything that changes how one runs takes it from here.

    kind, block, processor: classes of the model, of its blocks, and of the processor in their self-attention
    sparse_processor: makes what takes the place of such a processor, from it and the state of its layer
    grid: (frames, rows, columns) of the tokens of a model for latents of (frames, height, width)
    inputs: reads the arguments, positional and by name, of a forward of the model
    heads, head_size: of a model's attention
    blocks, self_attention, output: names of the list of blocks, of the self-attention in one, and of the layer that
        makes latents of the last block's tokens
    output_needs_grid: whether the output layer is given tokens by their place in the grid, and so has to see all
    in_raster_order: from the arguments of a forward to those by which the model leaves tokens in raster order and
        chooses no blocks itself; None where it never does otherwise
    """

    kind: type[nn.Module]
    block: type[nn.Module]
    processor: type[Any]
    sparse_processor: Callable[[Any, LayerState], Any]
    grid: Callable[[nn.Module, tuple[int, ...]], tuple[int, int, int]]
    inputs: Callable[[nn.Module, tuple, dict[str, Any]], ForwardInputs]
    heads: Callable[[nn.Module], int]
    head_size: Callable[[nn.Module], int]
    blocks: str = "blocks"
    self_attention: str = "attn1"
    output: str = "proj_out"
    output_needs_grid: bool = False
    in_raster_order: Callable[[tuple, dict[str, Any]], tuple[tuple, dict[str, Any]]] | None = None

    def blocks_of(self, transformer: nn.Module) -> nn.ModuleList:
        return getattr(transformer, self.blocks)

    def attentions_of(self, transformer: nn.Module) -> list[Any]:
        """The self-attention of each block, in order."""
        return [getattr(block, self.self_attention) for block in self.blocks_of(transformer)]

    def output_of(self, transformer: nn.Module) -> nn.Module:
        return getattr(transformer, self.output)

    def check(self, transformer: nn.Module) -> None:
        """Raise `InputError` for a model of another class."""
        if not isinstance(transformer, self.kind):
            raise InputError(
                f"{type(transformer).__name__} is not a {self.kind.__name__}; the attention fits only those"
            )
