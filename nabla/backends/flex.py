"""Block-sparse attention by compiled FlexAttention (arXiv 2412.05496).

Uncompiled FlexAttention ignores block lists and scores every pair. So it is only ever reached through custom operators
that compile it by themselves, whatever compiles or runs the caller, and that fail where torch.compile is switched off.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

from nabla import probe
from nabla.backends import flex_options
from nabla.backends.flex_options import Options
from nabla.block_lists import BlockLists, from_lists
from nabla.kernels.block_lists import lists_of_blocks
from nabla.kernels.block_selection import choose_lists
from nabla.selection import Selection
from nabla.tiling import TileLayout

DTYPES: tuple[torch.dtype, ...] | None = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES: tuple[int, ...] | None = None
# One compile a shape. The default limit of 8 counts every grid, dtype and head size of a process together.
RECOMPILE_LIMIT = 4096
# Of a trial, in which every query block keeps each eighth key block.
TRIAL_HEADS, TRIAL_BLOCKS, TRIAL_STRIDE = 16, 256, 8


class Blocks(NamedTuple):
    """Kept blocks by whether the key tile is full, since only partial tiles are masked token by token.

    Where all tiles are full, `partial` and `valid` are None, and the kernel has no masking in it at all.
    """

    full: BlockLists
    partial: BlockLists | None
    valid: Tensor | None


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


def unsupported_reason(
    device: torch.device, block: int, dtype: torch.dtype | None = None, head_size: int | None = None
) -> str:
    """Why this backend cannot run blocks of `block` tokens on a device, or ""."""
    return ""


def backward_unsupported_reason(
    device: torch.device, dtype: torch.dtype | None = None, head_size: int | None = None
) -> str:
    """Why this backend has no gradients on a device, of q, k and v of a dtype and head size, or ""."""
    return "" if device.type == "cuda" else f"has no backward on {device.type}"


def prepare(block_mask: Tensor, layout: TileLayout) -> Blocks:
    """A block mask (B or 1, heads or 1, N, N) bool -> what `attend` needs of it."""
    return _blocks(lists_of_blocks(block_mask, layout.full if layout.has_partial_tiles else None), layout)


def choose(q: Tensor, k: Tensor, selection: Selection) -> Blocks:
    """The blocks that block means q and k (B, heads, N, D) choose, prepared."""
    layout = selection.layout
    return _blocks(choose_lists(q, k, selection, split=layout.has_partial_tiles), layout)


def _blocks(lists: list[BlockLists], layout: TileLayout) -> Blocks:
    if not layout.has_partial_tiles:
        (full,) = lists
        return Blocks(full, None, None)
    full, partial = lists
    return Blocks(full, partial, layout.valid.flatten())


def block_counts(blocks: Blocks) -> Tensor:
    """How many key blocks each query block keeps: (B or 1, heads or 1, N)."""
    return blocks.full.counts + (0 if blocks.partial is None else blocks.partial.counts)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """Attention of q, k, v (B, heads, N * block, D) in tile order over the kept blocks; same shape and dtype.

    Raises `RuntimeError` where torch.compile is switched off.
    """
    return block_sparse(q, k, v, *blocks.full, *(blocks.partial or (None, None)), blocks.valid)


@torch.library.custom_op("nabla::flex", mutates_args=())
def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    partial_counts: Optional[Tensor],
    partial_indices: Optional[Tensor],
    valid: Optional[Tensor],
) -> Tensor:
    inputs = Inputs(q, k, v, counts, indices, partial_counts, partial_indices, valid)
    blocks = inputs.blocks
    lists = [blocks.full] if blocks.partial is None else [blocks.full, blocks.partial]
    probe.see(
        lambda: block_counts(blocks),
        lambda heads: from_lists(*(BlockLists(each.counts[:, heads], each.indices[:, heads]) for each in lists)),
    )
    options = flex_options.for_forward(*inputs.kind, _forward_trial)
    return probe.run(probe.ATTENTION, _run, inputs, options)


@block_sparse.register_fake
def _(q: Tensor, *_) -> Tensor:
    return torch.empty_like(q)


def block_sparse_backward(gradient: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, given that of the result of `block_sparse(*args)`, which is computed anew.

    FlexAttention can only be differentiated in a graph that it is called in.
    """
    inputs = Inputs(*args)
    return _differentiate(gradient, inputs, flex_options.for_backward(*inputs.kind, _forward_trial, _backward_trial))


# Not a `custom_op`: those run where autograd is switched off, so that nothing can be differentiated in them.
# A fragment: `custom_op` adds to this namespace too. Kept in a variable, since what it registers ends with it.
_library = torch.library.Library("nabla", "FRAGMENT")
_library.define(
    "flex_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, "
    "Tensor? partial_counts, Tensor? partial_indices, Tensor? valid) -> (Tensor, Tensor, Tensor)"
)
_library.impl("flex_backward", block_sparse_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("nabla::flex_backward", lib=_library)
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.nabla.flex_backward(gradient, *ctx.saved_tensors), None, None, None, None, None


block_sparse.register_autograd(_backward, setup_context=_keep_for_backward)


def _differentiate(gradient: Tensor, inputs: Inputs, options: Options) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, given that of the result."""
    blocks = inputs.blocks
    # The gradients of k and v are summed by key block, over the query blocks that keep it.
    partial = (None, None) if blocks.partial is None else _transpose(*blocks.partial)
    transposed = *_transpose(*blocks.full), *partial
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        result = _run(inputs._replace(q=q, k=k, v=v), options, transposed)
        return torch.autograd.grad(result, (q, k, v), gradient)


def _transpose(counts: Tensor, indices: Tensor) -> BlockLists:
    """Lists of the query blocks that keep each key block."""
    (lists,) = lists_of_blocks(from_lists(BlockLists(counts, indices)).mT.contiguous())
    return lists


def _run(inputs: Inputs, options: Options, transposed: Lists | None = None) -> Tensor:
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
        return _compiled()(*inputs, options, transposed)


def _forward_trial(device: torch.device, dtype: torch.dtype, head_size: int, block: int, options: Options) -> float:
    inputs = _trial_inputs(device, dtype, head_size, block)
    return flex_options.seconds(lambda: _run(inputs, options), device, options)


def _backward_trial(device: torch.device, dtype: torch.dtype, head_size: int, block: int, options: Options) -> float:
    inputs = _trial_inputs(device, dtype, head_size, block)
    return flex_options.seconds(lambda: _differentiate(inputs.q, inputs, options), device, options)


def _trial_inputs(device: torch.device, dtype: torch.dtype, head_size: int, block: int) -> Inputs:
    """A problem large enough to tell options apart, and small beside any for which they matter."""
    q, k, v = torch.randn(3, 1, TRIAL_HEADS, TRIAL_BLOCKS * block, head_size, device=device, dtype=dtype)
    kept = torch.arange(0, TRIAL_BLOCKS, TRIAL_STRIDE, dtype=torch.int32, device=device)
    indices = torch.zeros(1, TRIAL_HEADS, TRIAL_BLOCKS, TRIAL_BLOCKS, dtype=torch.int32, device=device)
    indices[..., : len(kept)] = kept
    return Inputs(q, k, v, torch.full_like(indices[..., 0], len(kept)), indices, None, None, None)


# In one graph, since after a break FlexAttention would run uncompiled, which is dense. With dynamic shapes a `mask_mod`
# does not compile on a CPU.
@functools.cache
def _compiled() -> Callable[..., Tensor]:
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
) -> Tensor:
    """The attention, to be compiled.

    transposed: lists of the query blocks that keep each key block, where it is differentiated
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
    return flex_attention(q, k, v, block_mask=mask, kernel_options=options)


def _partial_first(
    counts: Tensor, indices: Tensor, partial_counts: Tensor | None, partial_indices: Tensor | None
) -> Lists:
    """The lists in `BlockMask`'s order: those that `mask_mod` is asked for, and those named as "full", which skip it.

    Without a `mask_mod` a CPU takes only lists that are not named as "full".
    """
    if partial_counts is None or partial_indices is None:
        return counts, indices, None, None
    return partial_counts, partial_indices, counts, indices
