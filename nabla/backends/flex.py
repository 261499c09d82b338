"""Block-sparse attention by compiled FlexAttention.

Uncompiled FlexAttention ignores block lists and scores every pair. So it is only ever reached through a custom operator
that compiles it by itself, whatever compiles or runs the caller, and that fails where torch.compile is switched off.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

from nabla import fast_selection
from nabla.block_lists import BlockLists, to_lists
from nabla.selection import Selection
from nabla.tiling import TileLayout

DIFFERENTIABLE = False
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One compile a shape. The default limit of 8 counts every grid, dtype and head size of a process together.
RECOMPILE_LIMIT = 4096


class Blocks(NamedTuple):
    """Kept blocks by whether the key tile is full, since only partial tiles are masked token by token.

    Where all tiles are full, `partial` and `valid` are None, and the kernel has no masking in it at all.
    """

    full: BlockLists
    partial: BlockLists | None
    valid: Tensor | None


def prepare(blocks: Tensor, layout: TileLayout) -> Blocks:
    """Kept blocks (B or 1, heads or 1, N, N) bool -> what `attend` needs of them."""
    if not layout.has_partial_tiles:
        return Blocks(to_lists(blocks), None, None)
    return Blocks(to_lists(blocks & layout.full), to_lists(blocks & ~layout.full), layout.valid.flatten())


def choose(q: Tensor, k: Tensor, selection: Selection) -> Blocks:
    """The blocks that q and k (B, heads, N * block, D) in tile order choose, prepared."""
    layout = selection.layout
    if not fast_selection.applies(q, selection):
        return prepare(selection.blocks(q, k), layout)
    full, partial = fast_selection.select_lists(q, k, selection)
    return Blocks(full, partial, layout.valid.flatten() if layout.has_partial_tiles else None)


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
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
        return _compiled()(q, k, v, counts, indices, partial_counts, partial_indices, valid)


@block_sparse.register_fake
def _(q: Tensor, *_) -> Tensor:
    return torch.empty_like(q)


@functools.cache
def _compiled():
    return torch.compile(_flex, fullgraph=True, dynamic=False)


def _flex(q, k, v, counts, indices, partial_counts, partial_indices, valid) -> Tensor:
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
    return flex_attention(q, k, v, block_mask=mask, kernel_options=_kernel_options(q, block))


def _kernel_options(q: Tensor, block: int) -> dict[str, int]:
    """Options that suit small blocks: the defaults do not compile for 64 tokens and are half as fast where they do."""
    if q.device.type != "cuda":
        return {}
    tile = min(block, 64)
    stage = 2 * tile * q.shape[-1] * q.element_size()
    room = _shared_memory(q.device) - stage // 2
    return {"BLOCK_M": tile, "BLOCK_N": tile, "num_warps": 4, "num_stages": max(1, min(3, room // stage))}


@torch.compiler.assume_constant_result
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
