"""Block-sparse attention by compiled FlexAttention.

Uncompiled FlexAttention ignores block lists and scores every pair. So the kernel is only ever reached through a
full-graph compile that fails rather than runs eagerly, and `mask_mod` states the whole truth besides: even a backend
of torch.compile that executes the graph eagerly gives the right result.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nabla.block_lists import BlockLists, to_lists
from nabla.tiling import TileLayout

DIFFERENTIABLE = False
# One compile a shape. The default limit of 8 counts every grid, dtype and head size of a process together.
RECOMPILE_LIMIT = 4096


class Blocks(NamedTuple):
    """Kept blocks, split by whether the key tile is full: only partial tiles are masked token by token."""

    kept: Tensor
    sizes: Tensor
    partial: BlockLists
    full: BlockLists


def prepare(blocks: Tensor, layout: TileLayout) -> Blocks:
    """Kept blocks (B or 1, heads or 1, N, N) bool -> what `attend` needs of them."""
    full_tiles = layout.sizes == layout.block
    return Blocks(blocks, layout.sizes, to_lists(blocks & ~full_tiles), to_lists(blocks & full_tiles))


@torch.library.custom_op("nabla::own_buffer", mutates_args=())
def own_buffer(x: Tensor) -> Tensor:
    """A copy that a compiler cannot see through.

    On a CPU (torch 2.13) a tensor that `mask_mod` captures from its own graph is read wrongly unless it is opaque.
    """
    return x.clone()


@own_buffer.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """Attention of q, k, v (B, heads, N * block, D) in tile order over the kept blocks; same shape and dtype.

    Raises `RuntimeError` where torch.compile is switched off.
    """
    if torch.compiler.is_compiling():
        return _flex(q, k, v, blocks)
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
        return _compiled()(q, k, v, blocks)


@functools.cache
def _compiled():
    return torch.compile(_flex, fullgraph=True, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "the flex backend needs torch.compile, which is switched off here (TORCHDYNAMO_DISABLE, force_eager or a "
            "recompile limit); switch it on or use backend: reference"
        )
    kept, sizes = own_buffer(blocks.kept), blocks.sizes
    block = q.shape[2] // kept.shape[-1]
    batches, heads = kept.shape[:2]

    def keeps(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        tile = key // block
        return kept[b % batches, h % heads, query // block, tile] & (key % block < sizes[tile])

    # The transposed lists, second, are read by a backward alone. Here there is none, but torch 2.8 wants them given.
    lists = *blocks.partial, *blocks.full
    mask = BlockMask((q.shape[2], k.shape[2]), *lists, *lists, BLOCK_SIZE=(block, block), mask_mod=keeps)
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
