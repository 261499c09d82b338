"""Block masks as lists on a GPU: the True entries of each row, in order, by one program a row."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from nabla import probe
from nabla.block_lists import BlockLists, to_lists
from nabla.kernels.gpu import can_run, tl, triton

# The row of a mask has to fit into the registers of a program; `append` relies on fewer than 2**16.
MAX_BLOCKS = 8192
ENTRIES_A_WARP = 512


def lists_of_blocks(block_mask: Tensor, full: Tensor | None = None) -> list[BlockLists]:
    """Lists of the True entries of a block mask (B, heads, N, N) bool.

    full: (N,) bool; if given, there are two lists, of full key tiles and of the others
    """
    if can_run(block_mask) and block_mask.shape[-1] <= MAX_BLOCKS:
        return parts_of(_lists_of_blocks(block_mask, full))
    return [to_lists(block_mask)] if full is None else [to_lists(block_mask & full), to_lists(block_mask & ~full)]


@torch.library.custom_op("nabla::lists_of_blocks", mutates_args=())
def _lists_of_blocks(block_mask: Tensor, full: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    counts, indices = empty_lists(block_mask, full)
    probe.run(probe.MASK, _write_lists, block_mask, full, counts, indices)
    return counts, indices


def _write_lists(block_mask: Tensor, full: Tensor | None, counts: Tensor, indices: Tensor) -> None:
    batch, heads, blocks, _ = block_mask.shape
    width = triton.next_power_of_2(blocks)
    # Triton launches on the current device, wherever its tensors are.
    with torch.cuda.device(block_mask.device):
        _list_row[(blocks, heads, batch)](
            block_mask,
            full,
            counts,
            indices,
            # A mask may be some heads of a larger one. Of lists parts and batches have strides: in some heads of them,
            # too, rows lie one behind the other.
            *block_mask.stride()[:3],
            *counts.stride()[:2],
            *indices.stride()[:2],
            blocks,
            WIDTH=width,
            num_warps=max(1, width // ENTRIES_A_WARP),
        )


@_lists_of_blocks.register_fake
def _(block_mask: Tensor, full: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_lists(block_mask, full)


def parts_of(lists: tuple[Tensor, Tensor]) -> list[BlockLists]:
    """Counts and indices of one or two parts, stacked, to the lists of each."""
    return [BlockLists(*pair) for pair in zip(*(x.unbind() for x in lists))]


def empty_lists(like: Tensor, full: Tensor | None) -> tuple[Tensor, Tensor]:
    """Memory for counts (parts, B, heads, N) and indices (parts, B, heads, N, N); like: (B, heads, N, anything)."""
    shape = 1 if full is None else 2, *like.shape[:3]
    return like.new_empty(shape, dtype=torch.int32), like.new_empty((*shape, shape[-1]), dtype=torch.int32)


if triton is not None:

    @triton.jit
    def _list_row(
        block_mask,
        full,
        counts,
        indices,
        mask_batch,
        mask_head,
        mask_row,
        counts_part,
        counts_batch,
        indices_part,
        indices_batch,
        blocks,
        WIDTH: tl.constexpr,
    ):
        query, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        column = tl.arange(0, WIDTH)
        # In 64 bits: 40 heads of 3,660 blocks, as of 241 frames of 1280x720, have 5 * 10**8 entries a sample.
        start = batch.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head + query * mask_row
        kept = tl.load(block_mask + start + column, mask=column < blocks, other=0) != 0
        counts, indices = lists_at(counts, indices, counts_batch, indices_batch, blocks)
        stored = append(kept, column, 0, blocks, full, indices, indices_part)
        close(stored, full, counts, indices, counts_part, indices_part)

    @triton.jit
    def lists_at(counts, indices, counts_batch, indices_batch, blocks):
        """Where the lists of the row are that this program does, of a grid of (blocks, heads, batch)."""
        row = tl.program_id(1).to(tl.int64) * blocks + tl.program_id(0)
        batch = tl.program_id(2).to(tl.int64)
        return counts + batch * counts_batch + row, indices + batch * indices_batch + row * blocks

    @triton.jit
    def append(kept, column, stored, blocks, full, indices, indices_part):
        """Store the blocks kept of some columns behind those stored, and return how many are stored then.

        One number counts the blocks of both lists, shorter than 2**16: whole tiles, and 65,536 for a partial one.
        """
        # What is None is a constant to Triton, so that only one of the branches is compiled.
        if full is None:
            one = kept.to(tl.int32)
            rank = stored + tl.cumsum(one, axis=0)
            tl.store(indices + rank - 1, column, mask=kept)
        else:
            whole = tl.load(full + column, mask=column < blocks, other=0) != 0
            one = tl.where(kept, tl.where(whole, 1, 65536), 0)
            rank = stored + tl.cumsum(one, axis=0)
            tl.store(indices + (rank & 65535) - 1, column, mask=kept & whole)
            tl.store(indices + indices_part + (rank >> 16) - 1, column, mask=kept & (whole == 0))
        return stored + tl.sum(one, axis=0)

    @triton.jit
    def close(stored, full, counts, indices, counts_part, indices_part):
        """Store the lengths of a row's lists."""
        # Kernels may look at a list's first entry before they look at its length.
        tl.store(counts, stored & 65535)
        tl.store(indices, 0, mask=(stored & 65535) == 0)
        if full is not None:
            tl.store(counts + counts_part, stored >> 16)
            tl.store(indices + indices_part, 0, mask=(stored >> 16) == 0)
