"""Block-sparse attention by compiled FlexAttention.

Uncompiled FlexAttention ignores block lists and scores every pair. So it is only ever reached through a custom operator
that compiles it by itself, whatever compiles or runs the caller, and that fails where torch.compile is switched off.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

from nabla.backends import flex_options
from nabla.backends.flex_options import Options
from nabla.block_lists import BlockLists
from nabla.fast_selection import choose_lists, lists_of_blocks
from nabla.selection import Selection
from nabla.tiling import TileLayout

DIFFERENTIABLE = False
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = None
# One compile a shape. The default limit of 8 counts every grid, dtype and head size of a process together.
RECOMPILE_LIMIT = 4096
TRIALS, TRIAL_HEADS, TRIAL_BLOCKS, TRIAL_STRIDE = 5, 16, 256, 8

log = logging.getLogger("nabla")


class Blocks(NamedTuple):
    """Kept blocks by whether the key tile is full, since only partial tiles are masked token by token.

    Where all tiles are full, `partial` and `valid` are None, and the kernel has no masking in it at all.
    """

    full: BlockLists
    partial: BlockLists | None
    valid: Tensor | None


def missing(device: torch.device, block: int) -> str:
    """Why this backend cannot run blocks of `block` tokens on a device, or ""."""
    return ""


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


def kept_counts(blocks: Blocks) -> Tensor:
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
    options = flex_options.for_device(q.device, q.dtype, q.shape[-1], block, _seconds)
    return _run(args, options)


@block_sparse.register_fake
def _(q: Tensor, *_) -> Tensor:
    return torch.empty_like(q)


def _run(args: tuple[Tensor | None, ...], options: Options) -> Tensor:
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
        return _compiled()(*args, options)


def _seconds(device: torch.device, dtype: torch.dtype, head_size: int, block: int, options: Options) -> float:
    """The time of a call with some options on a problem large enough to tell, infinity if they do not compile."""
    q, k, v = torch.randn(3, 1, TRIAL_HEADS, TRIAL_BLOCKS * block, head_size, device=device, dtype=dtype)
    kept = torch.arange(0, TRIAL_BLOCKS, TRIAL_STRIDE, dtype=torch.int32, device=device)
    indices = torch.zeros(1, TRIAL_HEADS, TRIAL_BLOCKS, TRIAL_BLOCKS, dtype=torch.int32, device=device)
    indices[..., : len(kept)] = kept
    args = q, k, v, torch.full_like(indices[..., 0], len(kept)), indices, None, None, None
    try:
        _run(args, options)
    except InductorError as error:
        log.info("%s do not compile: %s", options, str(error).strip().splitlines()[0])
        return math.inf
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(TRIALS):
        _run(args, options)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / TRIALS


@functools.cache
def _compiled():
    return torch.compile(_flex, fullgraph=True, dynamic=False)


def _flex(q, k, v, counts, indices, partial_counts, partial_indices, valid, options) -> Tensor:
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "the flex backend needs torch.compile, which is switched off here (TORCHDYNAMO_DISABLE or force_eager); "
            "switch it on or use backend: reference"
        )
    block = q.shape[2] // counts.shape[-1]

    def is_valid(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return valid[key]

    # Blocks named as "full" skip mask_mod. Without one, a CPU takes only lists that are not named so.
    if valid is None:
        lists, mask_mod = (counts, indices, None, None), noop_mask
    else:
        lists, mask_mod = (partial_counts, partial_indices, counts, indices), is_valid
    # The transposed lists, second, are read by a backward alone. Here there is none, but torch 2.8 wants them given.
    mask = BlockMask((q.shape[2], k.shape[2]), *lists, *lists, BLOCK_SIZE=(block, block), mask_mod=mask_mod)
    return flex_attention(q, k, v, block_mask=mask, kernel_options=options)
