"""What is compiled of FlexAttention (arXiv 2412.05496), and what it is given.

Uncompiled FlexAttention ignores block lists and scores every pair, so `run` fails where torch.compile is switched off.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

from nabla.backends import flex_options
from nabla.backends.flex_options import Options
from nabla.block_lists import BlockLists

# One compile a shape. The default limit of 8 counts every grid, dtype and head size of a process together.
RECOMPILE_LIMIT = 4096
# How to ask for more than the attention; torch 2.8 has it not, and is asked otherwise.
AUXILIARY = getattr(flex_module, "AuxRequest", None)


class Blocks(NamedTuple):
    """Kept blocks by whether the key tile is full, since only partial tiles are masked token by token.

    Where all tiles are full, `partial` and `valid` are None, and the kernel has no masking in it at all.
    """

    full: BlockLists
    partial: BlockLists | None
    valid: Tensor | None

    @property
    def lists(self) -> list[BlockLists]:
        """Those that are there."""
        return [self.full] if self.partial is None else [self.full, self.partial]


class Inputs(NamedTuple):
    """All that the operators take, for they take tensors alone: q, k, v and the fields of `Blocks`."""

    q: Tensor
    k: Tensor
    v: Tensor
    counts: Tensor
    indices: Tensor
    partial_counts: Tensor | None
    partial_indices: Tensor | None
    valid: Tensor | None

    @property
    def blocks(self) -> Blocks:
        partial = None
        if self.partial_counts is not None and self.partial_indices is not None:
            partial = BlockLists(self.partial_counts, self.partial_indices)
        return Blocks(BlockLists(self.counts, self.indices), partial, self.valid)

    @property
    def kind(self) -> tuple[torch.device, torch.dtype, int, int]:
        """Device, dtype, head size and tokens of a block: what kernel options depend on."""
        return self.q.device, self.q.dtype, self.q.shape[-1], self.q.shape[2] // self.counts.shape[-1]


# Counts and indices of one or two lists.
Lists = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def run(inputs: Inputs, options: Options, transposed: Lists | None = None, sums: bool = False) -> Any:
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
        return _compiled()(*inputs, options, transposed, sums)


# In one graph, since after a break FlexAttention would run uncompiled, which is dense. With dynamic shapes a `mask_mod`
# does not compile on a CPU.
@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_flex, fullgraph=True, dynamic=False)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    partial_counts: Tensor | None,
    partial_indices: Tensor | None,
    valid: Tensor | None,
    options: Any,  # `Options`, of which newer torch has a type of its own
    transposed: Lists | None,
    sums: bool,
) -> Any:
    """The attention, to be compiled.

    transposed: lists of the query blocks that keep each key block, where it is differentiated
    sums: whether to give the logarithms of the sums of rows beside it
    """
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "the flex backend needs torch.compile, which is switched off here (TORCHDYNAMO_DISABLE or force_eager); "
            "switch it on or use backend: reference"
        )
    block = q.shape[2] // counts.shape[-1]
    lists = _partial_first(counts, indices, partial_counts, partial_indices)
    # The transposed lists are read by a backward alone, but torch 2.8 wants them given.
    if transposed is None:
        transposed = lists
    else:
        # A backward's options are refused where the device's default ones do not divide the blocks, even if others are
        # given. So the blocks are given there as larger ones, and as they are among the options.
        transposed, block = _partial_first(*transposed), math.lcm(block, flex_options.LARGEST_TILE)
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = noop_mask
    if valid is not None:
        # `valid` is an input of the graph: on a CPU a mask that is computed in it is misread. It has a boolean a token,
        # because looking a block up in a mask would take registers, and two fifths of the speed.
        def is_valid(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return valid[key]

        mask_mod = is_valid
    shape = q.shape[2], k.shape[2]
    # Not by `from_kv_blocks`, which in torch 2.8 always makes transposed lists.
    mask = BlockMask(shape, *lists, *transposed, BLOCK_SIZE=(block, block), mask_mod=mask_mod)
    if not sums:
        return flex_attention(q, k, v, block_mask=mask, kernel_options=options)
    if AUXILIARY is None:
        return flex_attention(q, k, v, block_mask=mask, kernel_options=options, return_lse=True)
    out, others = flex_attention(q, k, v, block_mask=mask, kernel_options=options, return_aux=AUXILIARY(lse=True))
    return out, others.lse


def _partial_first(
    counts: Tensor, indices: Tensor, partial_counts: Tensor | None, partial_indices: Tensor | None
) -> Lists:
    """The lists in `BlockMask`'s order: those that `mask_mod` is asked for, and those named as "full", which skip it.

    Without a `mask_mod` a CPU takes only lists that are not named as "full".
    """
    if partial_counts is None or partial_indices is None:
        return counts, indices, None, None
    return partial_counts, partial_indices, counts, indices
