"""Block-sparse attention by NVIDIA's cuDNN frontend, an optional requirement (requirements-cudnn.txt)."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from nabla.block_lists import BlockLists
from nabla.fast_selection import choose_lists, lists_of_blocks
from nabla.selection import Selection
from nabla.tiling import TileLayout

DIFFERENTIABLE = False
DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (128,)
BLOCK = 64
HOPPER = 9, 0


class Blocks(NamedTuple):
    """Kept blocks, and the valid tokens of every key tile (N,) int32, or None where all tiles are full."""

    lists: BlockLists
    sizes: Tensor | None


def missing(device: torch.device, block: int) -> str:
    """Why this backend cannot run blocks of `block` tokens on a device, or ""."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < HOPPER:
        return "needs an NVIDIA GPU of compute capability 9.0 or more"
    if block != BLOCK:
        return f"takes blocks of {BLOCK} tokens, not {block}"
    if importlib.util.find_spec("cudnn") is None:
        return "not installed, see requirements-cudnn.txt"
    return ""


def prepare(blocks: Tensor, layout: TileLayout) -> Blocks:
    """Kept blocks (B or 1, heads or 1, N, N) bool -> what `attend` needs of them."""
    return Blocks(*lists_of_blocks(blocks), _sizes(layout))


def choose(q: Tensor, k: Tensor, selection: Selection) -> Blocks:
    """The blocks that block means q and k (B, heads, N, D) choose, prepared."""
    return Blocks(*choose_lists(q, k, selection), _sizes(selection.layout))


def kept_counts(blocks: Blocks) -> Tensor:
    """How many key blocks each query block keeps: (B or 1, heads or 1, N)."""
    return blocks.lists.counts


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """Attention of q, k, v (B, heads, N * block, D) in tile order over the kept blocks; same shape and dtype."""
    return block_sparse(q, k, v, *blocks.lists, blocks.sizes)


@torch.library.custom_op("nabla::cudnn", mutates_args=())
def block_sparse(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, sizes: Optional[Tensor]) -> Tensor:
    from cudnn.block_sparse_attention import block_sparse_attention_forward

    rows = *q.shape[:2], counts.shape[-1]
    result = block_sparse_attention_forward(
        q,
        k,
        v,
        indices.expand(*rows, -1),
        block_sizes=sizes,
        q2k_block_nums=counts.expand(rows),
        sparse_block_size=BLOCK,
    )
    return result["o_tensor"]


@block_sparse.register_fake
def _(q: Tensor, *_) -> Tensor:
    return q.new_empty(q.shape)


def _sizes(layout: TileLayout) -> Tensor | None:
    return layout.sizes if layout.has_partial_tiles else None
