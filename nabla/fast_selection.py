"""Kept blocks as lists on a GPU: the rule of `nabla.selection` without sorting, in one pass over the block map.

Each program of the kernel holds one row of the map in registers. The least kept weight is found by bisecting on the
bits of non-negative floats, whose order is that of their values, so that 31 halvings are exact.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from nabla.block_lists import BlockLists, from_lists
from nabla.selection import MAP_ENTRIES, Selection

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# The row of a map has to fit into the registers of a program.
MAX_BLOCKS = 8192
ENTRIES_A_WARP = 1024


def applies(q: Tensor, selection: Selection) -> bool:
    """Whether this path can do a selection for q (B, heads, N * block, D)."""
    layout = selection.layout
    power = layout.block & (layout.block - 1) == 0
    return triton is not None and q.is_cuda and power and layout.blocks <= MAX_BLOCKS and not selection.is_fixed


def select_lists(q: Tensor, k: Tensor, selection: Selection) -> tuple[BlockLists, BlockLists | None]:
    """Lists of the blocks that `selection.blocks` keeps, of full tiles and of partial tiles; None if all are full.

    Sums are float32 in another order than there, so where two blocks are equal within rounding, or the running sum
    meets the threshold within it, the other block may be kept.
    """
    layout = selection.layout
    full = layout.full if layout.has_partial_tiles else None
    counts, indices = _select_lists(q, k, layout.sizes, full, selection.cut, selection.count, selection.window)
    lists = [BlockLists(*pair) for pair in zip(counts.unbind(), indices.unbind())]
    return lists[0], lists[1] if full is not None else None


def select_blocks(q: Tensor, k: Tensor, selection: Selection) -> Tensor:
    """The blocks of `select_lists` as (B, heads, N, N) bool."""
    full, partial = select_lists(q, k, selection)
    blocks = from_lists(full)
    return blocks if partial is None else blocks | from_lists(partial)


@torch.library.custom_op("nabla::select_lists", mutates_args=())
def _select_lists(
    q: Tensor,
    k: Tensor,
    sizes: Tensor,
    full: Optional[Tensor],
    cut: Optional[Tensor],
    count: Optional[Tensor],
    window: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """Counts (1 or 2, B, heads, N) and indices (1 or 2, B, heads, N, N), int32, of full tiles and of partial ones."""
    counts, indices = _empty_lists(q, sizes, full)
    heads = max(1, MAP_ENTRIES // (q.shape[0] * sizes.shape[0] ** 2))
    with torch.cuda.device(q.device), torch.autocast("cuda", enabled=False):
        q_means, k_means = (_block_means(x, sizes) for x in (q, k))
        for start in range(0, q.shape[1], heads):
            of = slice(start, start + heads)
            scores = (q_means[:, of] * q.shape[-1] ** -0.5) @ k_means[:, of].transpose(-1, -2)
            lists_of_map(scores, full, cut, count, window, counts[:, :, of], indices[:, :, of])
    return counts, indices


@_select_lists.register_fake
def _(q, k, sizes, full, cut, count, window):
    return _empty_lists(q, sizes, full)


def lists_of_map(
    scores: Tensor,
    full: Tensor | None,
    cut: Tensor | None,
    count: Tensor | None,
    window: Tensor | None,
    counts: Tensor,
    indices: Tensor,
) -> None:
    """Write the lists of a block map before its softmax, (B, heads, N, N) float32 and contiguous.

    counts, indices: to write, as `_select_lists` returns them, or a slice of their heads
    """
    batch, heads, blocks, _ = scores.shape
    width = triton.next_power_of_2(blocks)
    _select_row[(blocks, heads, batch)](
        scores,
        cut if count is None else count,
        window,
        full,
        counts,
        indices,
        *counts.stride()[:2],
        *indices.stride()[:2],
        blocks,
        WIDTH=width,
        BY_COUNT=count is not None,
        num_warps=max(1, width // ENTRIES_A_WARP),
    )


def _empty_lists(q: Tensor, sizes: Tensor, full: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = 1 if full is None else 2, *q.shape[:2], sizes.shape[0]
    return q.new_empty(shape, dtype=torch.int32), q.new_empty((*shape, shape[-1]), dtype=torch.int32)


def _block_means(x: Tensor, sizes: Tensor) -> Tensor:
    batch, heads, length, dim = x.shape
    blocks = sizes.shape[0]
    means = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device)
    grid = blocks, heads, batch
    _mean_of_block[grid](
        x, sizes, means, heads, blocks, *x.stride(), dim, BLOCK=length // blocks, WIDTH=triton.next_power_of_2(dim)
    )
    return means


if triton is not None:

    @triton.jit
    def _mean_of_block(
        x,
        sizes,
        means,
        heads,
        blocks,
        stride_b,
        stride_h,
        stride_s,
        stride_d,
        dim,
        BLOCK: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        size = tl.load(sizes + block)
        row, column = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
        start = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + block.to(tl.int64) * BLOCK * stride_s
        inside = (row[:, None] < size) & (column[None, :] < dim)
        values = tl.load(x + start + row[:, None] * stride_s + column[None, :] * stride_d, mask=inside, other=0.0)
        mean = tl.sum(values.to(tl.float32), axis=0) / size
        out = ((batch * heads + head).to(tl.int64) * blocks + block) * dim
        tl.store(means + out + column, mean, mask=column < dim)

    @triton.jit
    def _select_row(
        scores,
        limit,
        window,
        full,
        counts,
        indices,
        counts_part,
        counts_batch,
        indices_part,
        indices_batch,
        blocks,
        WIDTH: tl.constexpr,
        BY_COUNT: tl.constexpr,
    ):
        query, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        column = tl.arange(0, WIDTH)
        inside = column < blocks
        row = (batch * tl.num_programs(1) + head).to(tl.int64) * blocks + query
        score = tl.load(scores + row * blocks + column, mask=inside, other=float("-inf"))
        weight = tl.exp(score - tl.max(score, axis=0))
        bits = tl.where(inside, weight.to(tl.int32, bitcast=True), 2147483647)
        # Going up in weight, a block is kept from where the running measure, itself included, reaches the bound.
        if BY_COUNT:
            measure = inside.to(tl.float32)
            bound = blocks - tl.load(limit).to(tl.float32) + 1.0
        else:
            measure = tl.where(inside, weight, 0.0)
            bound = tl.load(limit) * tl.sum(measure, axis=0)
        low = tl.full((), 0, tl.int32)
        high = tl.full((), 1065353216, tl.int32)  # the bits of 1.0, the greatest weight
        while low < high:
            middle = (low + high) // 2
            reached = tl.sum(tl.where(bits <= middle, measure, 0.0), axis=0) >= bound
            low = tl.where(reached, low, middle + 1)
            high = tl.where(reached, middle, high)
        below = tl.sum(tl.where(bits < low, measure, 0.0), axis=0)
        tied = bits == low
        rank = tl.cumsum(tied.to(tl.int32), axis=0)
        ties = tl.sum(tied.to(tl.int32), axis=0)
        each = tl.max(tl.where(tied, measure, 0.0), axis=0)
        kept = tied & ((below + rank * each >= bound) | ((low == 1065353216) & (rank == ties)))
        kept = inside & (kept | (bits > low))
        if window is not None:
            kept = kept | (inside & (tl.load(window + query * blocks + column, mask=inside, other=0) != 0))
        out = head.to(tl.int64) * blocks + query
        counts += batch.to(tl.int64) * counts_batch + out
        indices += batch.to(tl.int64) * indices_batch + out * blocks
        if full is None:
            _store_list(kept, inside, column, counts, indices)
        else:
            whole = tl.load(full + column, mask=inside, other=0) != 0
            _store_list(kept & whole, inside, column, counts, indices)
            _store_list(kept & (whole == 0), inside, column, counts + counts_part, indices + indices_part)

    @triton.jit
    def _store_list(kept, inside, column, count_at, list_at):
        total = tl.sum(kept.to(tl.int32), axis=0)
        rank = tl.cumsum(kept.to(tl.int32), axis=0)
        place = tl.where(kept, rank - 1, total + column - rank)
        tl.store(count_at, total)
        tl.store(list_at + place, tl.where(kept, column, 0), mask=inside)
