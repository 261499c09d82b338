"""Block-sparse attention by compiled FlexAttention.

Uncompiled FlexAttention ignores block lists and scores every pair. So it is only ever reached through custom operators
that compile it by themselves, whatever compiles or runs the caller, and that fail where torch.compile is switched off.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

from nabla import probe
from nabla.backends import flex_options
from nabla.backends.flex_options import Options
from nabla.block_lists import BlockLists, from_lists
from nabla.kernels.block_lists import lists_of_blocks
from nabla.kernels.selection import choose_lists
from nabla.selection import Selection
from nabla.tiling import TileLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = None
# One compile a shape. The default limit of 8 counts every grid, dtype and head size of a process together.
RECOMPILE_LIMIT = 4096
TRIAL_HEADS, TRIAL_BLOCKS, TRIAL_STRIDE = 16, 256, 8

Args = tuple[Tensor | None, ...]


class Blocks(NamedTuple):
    """Kept blocks by whether the key tile is full, since only partial tiles are masked token by token.

    Where all tiles are full, `partial` and `valid` are None, and the kernel has no masking in it at all.
    """

    full: BlockLists
    partial: BlockLists | None
    valid: Tensor | None


def unsupported_reason(device: torch.device, block: int) -> str:
    """Why this backend cannot run blocks of `block` tokens on a device, or ""."""
    return ""


def backward_unsupported_reason(device: torch.device, dtype: torch.dtype | None) -> str:
    """Why this backend has no gradients on a device, of tensors of a dtype (None: not known), or ""."""
    return "" if device.type == "cuda" else f"has no backward on {device.type}"


def prepare(blocks: Tensor, layout: TileLayout) -> Blocks:
    """Kept blocks (B or 1, heads or 1, N, N) bool -> what `attend` needs of them."""
    return _blocks(lists_of_blocks(blocks, layout.full if layout.has_partial_tiles else None), layout)


def choose(q: Tensor, k: Tensor, selection: Selection) -> Blocks:
    """The blocks that block means q and k (B, heads, N, D) choose, prepared."""
    layout = selection.layout
    return _blocks(choose_lists(q, k, selection, split=layout.has_partial_tiles), layout)


def _blocks(lists: list[BlockLists], layout: TileLayout) -> Blocks:
    if not layout.has_partial_tiles:
        return Blocks(*lists, None, None)
    return Blocks(*lists, layout.valid.flatten())


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
    args = q, k, v, counts, indices, partial_counts, partial_indices, valid
    block = q.shape[2] // counts.shape[-1]
    lists = [BlockLists(counts, indices)]
    lists += [] if partial_counts is None else [BlockLists(partial_counts, partial_indices)]
    probe.see(
        lambda: sum(each.counts for each in lists),
        lambda heads: from_lists(*(BlockLists(*(x[:, heads] for x in each)) for each in lists)),
    )
    options = flex_options.for_forward(q.device, q.dtype, q.shape[-1], block, _forward_trial)
    return probe.run(probe.ATTENTION, _run, args, options)


@block_sparse.register_fake
def _(q: Tensor, *_) -> Tensor:
    return torch.empty_like(q)


def block_sparse_backward(gradient: Tensor, *args: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, given that of the result of `block_sparse(*args)`, which is computed anew.

    FlexAttention can only be differentiated in a graph that it is called in.
    """
    q, counts = args[0], args[3]
    kind = q.device, q.dtype, q.shape[-1], q.shape[2] // counts.shape[-1]
    return _differentiate(gradient, args, flex_options.for_backward(*kind, _forward_trial, _backward_trial))


# Not a `custom_op`: those run where autograd is switched off, so that nothing can be differentiated in them.
_library = torch.library.Library("nabla", "FRAGMENT")
_library.define(
    "flex_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, "
    "Tensor? partial_counts, Tensor? partial_indices, Tensor? valid) -> (Tensor, Tensor, Tensor)"
)
_library.impl("flex_backward", block_sparse_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("nabla::flex_backward", lib=_library)
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_for_backward(ctx: Any, inputs: Args, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> Args:
    return *torch.ops.nabla.flex_backward(gradient, *ctx.saved_tensors), None, None, None, None, None


block_sparse.register_autograd(_backward, setup_context=_keep_for_backward)


def _differentiate(gradient: Tensor, args: Args, options: Options) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, the first of `args`."""
    counts, indices, partial_counts, partial_indices = args[3:7]
    transposed = *_transpose(counts, indices), *_transpose(partial_counts, partial_indices)
    with torch.enable_grad():
        qkv = [x.detach().requires_grad_() for x in args[:3]]
        return torch.autograd.grad(_run((*qkv, *args[3:]), options, transposed), qkv, gradient)


def _transpose(counts: Tensor | None, indices: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Lists of the query blocks that keep each key block; None for None."""
    if counts is None:
        return None, None
    (lists,) = lists_of_blocks(from_lists(BlockLists(counts, indices)).mT.contiguous())
    return lists


def _run(args: Args, options: Options, transposed: Args | None = None) -> Tensor:
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
        return _compiled()(*args, options, transposed)


def _forward_trial(device: torch.device, dtype: torch.dtype, head_size: int, block: int, options: Options) -> float:
    args = _trial_args(device, dtype, head_size, block)
    return flex_options.seconds(lambda: _run(args, options), device, options)


def _backward_trial(device: torch.device, dtype: torch.dtype, head_size: int, block: int, options: Options) -> float:
    args = _trial_args(device, dtype, head_size, block)
    return flex_options.seconds(lambda: _differentiate(args[0], args, options), device, options)


def _trial_args(device: torch.device, dtype: torch.dtype, head_size: int, block: int) -> Args:
    """A problem large enough to tell options apart, and small beside any for which they matter."""
    q, k, v = torch.randn(3, 1, TRIAL_HEADS, TRIAL_BLOCKS * block, head_size, device=device, dtype=dtype)
    kept = torch.arange(0, TRIAL_BLOCKS, TRIAL_STRIDE, dtype=torch.int32, device=device)
    indices = torch.zeros(1, TRIAL_HEADS, TRIAL_BLOCKS, TRIAL_BLOCKS, dtype=torch.int32, device=device)
    indices[..., : len(kept)] = kept
    return q, k, v, torch.full_like(indices[..., 0], len(kept)), indices, None, None, None


@functools.cache
def _compiled():
    return torch.compile(_flex, fullgraph=True, dynamic=False)


def _flex(q, k, v, counts, indices, partial_counts, partial_indices, valid, options, transposed) -> Tensor:
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "the flex backend needs torch.compile, which is switched off here (TORCHDYNAMO_DISABLE or force_eager); "
            "switch it on or use backend: reference"
        )
    block = q.shape[2] // counts.shape[-1]

    def is_valid(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return valid[key]

    # Blocks named as "full" skip mask_mod. Without one, a CPU takes only lists that are not named so.
    def in_order(counts, indices, partial_counts, partial_indices):
        has_partial = partial_counts is not None
        return (partial_counts, partial_indices, counts, indices) if has_partial else (counts, indices, None, None)

    lists = in_order(counts, indices, partial_counts, partial_indices)
    # The transposed lists are read by a backward alone, but torch 2.8 wants them given.
    if transposed is None:
        transposed = lists
    else:
        # A backward's options are refused where the device's default ones do not divide the blocks, even if others are
        # given. So the blocks are given there as larger ones, and as they are among the options.
        transposed, block = in_order(*transposed), math.lcm(block, flex_options.LARGEST_TILE)
    mask_mod = noop_mask if valid is None else is_valid
    shape = q.shape[2], k.shape[2]
    mask = BlockMask(shape, *lists, *transposed, BLOCK_SIZE=(block, block), mask_mod=mask_mod)
    return flex_attention(q, k, v, block_mask=mask, kernel_options=options)
