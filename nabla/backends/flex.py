"""Block-sparse attention by compiled FlexAttention (arXiv 2412.05496).

Uncompiled FlexAttention ignores block lists and scores every pair. So it is only ever reached through custom operators
that compile it by themselves, whatever compiles or runs the caller, and that fail where torch.compile is switched off.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from nabla import probe
from nabla.backends import flex_options
from nabla.backends.flex_graph import Blocks, Inputs, run
from nabla.backends.flex_options import Options
from nabla.block_lists import BlockLists, from_lists
from nabla.dropped import TileMeans
from nabla.kernels.block_lists import lists_of_blocks
from nabla.kernels.block_selection import choose_lists
from nabla.kernels.dropped_means import join_means_of_lists
from nabla.selection import Selection
from nabla.tiling import TileLayout

DTYPES: tuple[torch.dtype, ...] | None = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES: tuple[int, ...] | None = None
# Of a trial, in which every query block keeps each eighth key block.
TRIAL_HEADS, TRIAL_BLOCKS, TRIAL_STRIDE = 16, 256, 8


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


def dropped_unsupported_reason(device: torch.device) -> str:
    """Why this backend cannot have means stand for dropped blocks on a device, or ""."""
    return "" if device.type == "cuda" else f"gives no sums to join means to on {device.type}"


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, means: TileMeans | None = None) -> Tensor:
    """Attention of q, k, v (B, heads, N * block, D) in tile order over the kept blocks; same shape and dtype.

    means: what stands for the others, None for nothing
    Raises `RuntimeError` where torch.compile is switched off.
    """
    inputs = q, k, v, *blocks.full, *(blocks.partial or (None, None)), blocks.valid
    if means is None:
        return block_sparse(*inputs)
    out, log_sums = block_sparse_with_sums(*inputs)
    return join_means_of_lists(q, out, log_sums, blocks.lists, means)


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
    return _forward(Inputs(q, k, v, counts, indices, partial_counts, partial_indices, valid))


# Another operator, since with sums there are no gradients, and without them sums would be stored for nothing.
@torch.library.custom_op("nabla::flex_with_sums", mutates_args=())
def block_sparse_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    partial_counts: Optional[Tensor],
    partial_indices: Optional[Tensor],
    valid: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """The attention, and the natural logarithm (B, heads, N * block) float32 of the sum of each row's exponentials."""
    return _forward(Inputs(q, k, v, counts, indices, partial_counts, partial_indices, valid), sums=True)


@block_sparse_with_sums.register_fake
def _(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _forward(inputs: Inputs, sums: bool = False) -> Any:
    blocks = inputs.blocks
    probe.see(
        lambda: block_counts(blocks),
        lambda heads: from_lists(*(BlockLists(each.counts[:, heads], each.indices[:, heads]) for each in blocks.lists)),
    )
    options = flex_options.for_forward(*inputs.kind, _forward_trial)
    return probe.run(probe.ATTENTION, run, inputs, options, sums=sums)


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
        result = run(inputs._replace(q=q, k=k, v=v), options, transposed)
        return torch.autograd.grad(result, (q, k, v), gradient)


def _transpose(counts: Tensor, indices: Tensor) -> BlockLists:
    """Lists of the query blocks that keep each key block."""
    (lists,) = lists_of_blocks(from_lists(BlockLists(counts, indices)).mT.contiguous())
    return lists


def _forward_trial(device: torch.device, dtype: torch.dtype, head_size: int, block: int, options: Options) -> float:
    inputs = _trial_inputs(device, dtype, head_size, block)
    return flex_options.seconds(lambda: run(inputs, options), device, options)


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
