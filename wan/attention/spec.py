"""What the machinery has to know of a model family's transformer: where its parts are, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from nabla import InputError
from wan.config.cache_settings import KINDS as CACHES

if TYPE_CHECKING:
    from wan.attention.layer import LayerState


class Argument(NamedTuple):
    """An argument of a forward: its place among those that are given without names, and its name."""

    place: int
    name: str

    def of(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        return args[self.place] if len(args) > self.place else kwargs[self.name]

    def put(self, value: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with another value in its place."""
        if len(args) > self.place:
            return (*args[: self.place], value, *args[self.place + 1 :]), kwargs
        return args, kwargs | {self.name: value}


class BlockList(NamedTuple):
    """Blocks of a transformer that run one after the other.

    name: of the list
    states: those arguments of a block that have rows for all tokens, (B, tokens, C)
    """

    name: str = "blocks"
    states: tuple[Argument, ...] = (Argument(0, "hidden_states"),)


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

    kind, block, processor: classes of the model, of the blocks in its last list, and of the processor in the
        self-attention of all
    sparse_processor: makes what takes the place of such a processor, from it and the state of its layer
    grid: (frames, rows, columns) of the tokens of a model for latents of (frames, height, width)
    inputs: reads the arguments, positional and by name, of a forward of the model
    heads, head_size: of a model's attention
    blocks: the lists of its blocks in the order in which they run; layers are counted through all of them
    self_attention, output: names of the self-attention in a block, and of the layer that makes latents of the last
        block's tokens
    timestep: where a forward of the model has it
    caches: the kinds of step caches that are right with it, of those in `wan.config.cache_settings`
    splits: whether tokens can be split over processes: not where something between blocks takes them by their place
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
    blocks: tuple[BlockList, ...] = (BlockList(),)
    self_attention: str = "attn1"
    output: str = "proj_out"
    splits: bool = True
    output_needs_grid: bool = False
    timestep: Argument = Argument(1, "timestep")
    caches: frozenset[str] = frozenset(CACHES)
    in_raster_order: Callable[[tuple, dict[str, Any]], tuple[tuple, dict[str, Any]]] | None = None

    def blocks_of(self, transformer: nn.Module) -> nn.ModuleList:
        """Those of all lists, in the order in which they run."""
        if len(self.blocks) == 1:
            return getattr(transformer, self.blocks[0].name)
        return nn.ModuleList([block for one in self.blocks for block in getattr(transformer, one.name)])

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

    def check_cache(self, kind: str) -> None:
        """Raise `InputError` for a kind of step cache that gives wrong results with such a model."""
        if kind not in self.caches:
            right = ", ".join(sorted(self.caches))
            raise InputError(
                f"cache {kind} does not work with {self.kind.__name__}, which adds to what its blocks give; "
                f"use one of none, {right}"
            )
