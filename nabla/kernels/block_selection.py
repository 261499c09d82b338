"""Blocks chosen on a GPU: the rule of `nabla.selection` without sorting, in one pass over the block map.

Each program of the kernel holds one row of the map in registers. The least kept weight is found by bisecting on the
bits of non-negative floats, whose order is that of their values, so that the search is exact.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from nabla import probe
from nabla.block_lists import BlockLists
from nabla.kernels.block_lists import ENTRIES_A_WARP, MAX_BLOCKS, empty_lists, lists_of_blocks, parts_of
from nabla.kernels.block_map import block_scores
from nabla.kernels.gpu import can_run, tl, triton
from nabla.selection import MAP_ENTRIES, Selection

# Of a thread. Of a multiprocessor's 65,536 that is eight rows of four warps at once, or sixteen of two.
REGISTERS = 64


def applies(means: Tensor, selection: Selection) -> bool:
    """Whether this path can do a selection for block means (B, heads, N, D)."""
    is_plain = selection.layout.parts == 1 and selection.least is None and selection.most is None
    return can_run(means) and selection.layout.blocks <= MAX_BLOCKS and not selection.is_fixed and is_plain


def choose_lists(q: Tensor, k: Tensor, selection: Selection, split: bool = False) -> list[BlockLists]:
    """Lists of the blocks that `selection.block_mask` keeps for block means q and k (B, heads, N, D) float32.

    split: two lists, of full key tiles and of partial ones
    Here sums are float32 in another order than there, so where two blocks are equal within rounding, or the running
    sum meets the threshold within it, the other block may be kept.
    """
    full = selection.layout.full if split else None
    if not applies(q, selection):
        return lists_of_blocks(selection.block_mask(q, k), full)
    return parts_of(_select_lists(q, k, full, selection.cut, selection.count, selection.window))


@torch.library.custom_op("nabla::select_lists", mutates_args=())
def _select_lists(
    q: Tensor,
    k: Tensor,
    full: Optional[Tensor],
    cut: Optional[Tensor],
    count: Optional[Tensor],
    window: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """Counts (1 or 2, B, heads, N) and indices (1 or 2, B, heads, N, N), int32, of full tiles and of partial ones."""
    counts, indices = empty_lists(q, full)
    probe.run(probe.MASK, _write_lists, q, k, full, cut, count, window, counts, indices)
    return counts, indices


def _write_lists(
    q: Tensor,
    k: Tensor,
    full: Tensor | None,
    cut: Tensor | None,
    count: Tensor | None,
    window: Tensor | None,
    counts: Tensor,
    indices: Tensor,
) -> None:
    batch, heads, blocks, _ = q.shape
    # A map is 4 bytes an entry; all heads of a long video at once would be gigabytes.
    group = max(1, MAP_ENTRIES // (batch * blocks**2))
    with torch.cuda.device(q.device):
        for start in range(0, heads, group):
            of = slice(start, start + group)
            scores = block_scores(q[:, of], k[:, of])
            lists_of_map(scores, full, cut, count, window, counts[:, :, of], indices[:, :, of])


@_select_lists.register_fake
def _(q: Tensor, k: Tensor, full: Tensor | None, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_lists(q, full)


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

    counts, indices: to write, as `nabla::select_lists` returns them, or a slice of their heads
    """
    batch, heads, blocks, _ = scores.shape
    # The greatest power of two that is not above `blocks`; the tail takes what is beyond it.
    width = 1 << (blocks.bit_length() - 1)
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
        HEAD=width,
        TAIL=triton.next_power_of_2(max(1, blocks - width)),
        BY_COUNT=count is not None,
        num_warps=max(1, width // ENTRIES_A_WARP),
        maxnreg=REGISTERS,
    )


if triton is not None:
    from nabla.kernels.block_lists import append, close, lists_at

    GREATEST = tl.constexpr(1065353216)  # the bits of 1.0, a row's greatest weight
    # Beyond the bits of any weight, so that a column outside of the row is never below a guess.
    OUTSIDE = tl.constexpr(2147483647)

    @triton.jit
    def _measure(bits, BY_COUNT: tl.constexpr):
        """What an entry counts for: 1, or its weight."""
        return tl.full(bits.shape, 1.0, tl.float32) if BY_COUNT else bits.to(tl.float32, bitcast=True)

    @triton.jit
    def _sum_max_and_min(sum_a, max_a, min_a, sum_b, max_b, min_b):
        return sum_a + sum_b, tl.maximum(max_a, max_b), tl.minimum(min_a, min_b)

    @triton.jit
    def _max_and_min(max_a, min_a, max_b, min_b):
        return tl.maximum(max_a, max_b), tl.minimum(min_a, min_b)

    @triton.jit
    def _load_scores(scores, column, blocks):
        """Scores of a row, with their greatest and least."""
        inside = column < blocks
        score = tl.load(scores + column, mask=inside, other=float("-inf"))
        greatest, least = tl.reduce((score, tl.where(inside, score, float("inf"))), 0, _max_and_min)
        return score, greatest, least

    @triton.jit
    def _split_at(bits, guess, BY_COUNT: tl.constexpr):
        """The measure of the entries up to a guess, the greatest of them, and the least above it."""
        below = bits <= guess
        measures = tl.where(below, _measure(bits, BY_COUNT), 0.0)
        return tl.reduce((measures, tl.where(below, bits, 0), tl.where(below, OUTSIDE, bits)), 0, _sum_max_and_min)

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
        HEAD: tl.constexpr,
        TAIL: tl.constexpr,
        BY_COUNT: tl.constexpr,
    ):
        # A row is held in two parts, of powers of two: one for both would be up to twice as wide as the row.
        query, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        column, tail_column = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
        row = scores + ((batch * tl.num_programs(1) + head).to(tl.int64) * blocks + query) * blocks
        score, greatest, least = _load_scores(row, column, blocks)
        tail_score, tail_greatest, tail_least = _load_scores(row, tail_column, blocks)
        greatest, least = tl.maximum(greatest, tail_greatest), tl.minimum(least, tail_least)
        # Not divided by their sum; the bound is multiplied by it instead.
        weight, tail_weight = tl.exp(score - greatest), tl.exp(tail_score - greatest)
        bits = tl.where(column < blocks, weight.to(tl.int32, bitcast=True), OUTSIDE)
        tail_bits = tl.where(tail_column < blocks, tail_weight.to(tl.int32, bitcast=True), OUTSIDE)
        # Going up in weight, a block is kept from where the running measure, itself included, reaches the bound.
        # By count the measure goes from 1 for the least to `blocks` for the greatest.
        if BY_COUNT:
            total = tl.full((), 0.0, tl.float32) + blocks
            bound = total - tl.load(limit).to(tl.float32) + 1.0
        else:
            total = tl.sum(weight, axis=0) + tl.sum(tail_weight, axis=0)
            bound = tl.load(limit) * total
        # So the least kept entry is the first whose measure, with all below it, reaches the bound. It lies between the
        # entries `low` and `high`. Guesses are where the bound lies between the measures up to these, and every other
        # time halfway from there to the middle, so that they close in from both sides.
        low, high = tl.exp(least - greatest).to(tl.int32, bitcast=True), tl.full((), GREATEST, tl.int32)
        to_low, to_high = tl.full((), 0.0, tl.float32), total
        centred = tl.full((), 0, tl.int32)
        # Every round brings one of them an entry nearer at least, so that the search ends.
        while low < high:
            share = (bound - to_low) / (to_high - to_low)
            guess = low + (share * (high - low).to(tl.float32)).to(tl.int32)
            guess = tl.minimum(tl.maximum(guess, low), high - 1)
            guess = tl.where(centred == 1, guess + (low + (high - low) // 2 - guess) // 2, guess)
            centred = 1 - centred
            to_guess, last_below, first_above = _split_at(bits, guess, BY_COUNT)
            tail_to_guess, tail_last, tail_first = _split_at(tail_bits, guess, BY_COUNT)
            to_guess += tail_to_guess
            last_below, first_above = tl.maximum(last_below, tail_last), tl.minimum(first_above, tail_first)
            # Where the bound is reached, `high` falls to the last entry up to the guess, which is the one if without it
            # the bound is not reached. Where it is not, `low` rises to the first entry above.
            reached = to_guess >= bound
            found = to_guess - _measure(last_below, BY_COUNT) < bound
            low = tl.where(reached, tl.where(found, last_below, low), first_above)
            high = tl.where(reached, last_below, high)
            to_low = tl.where(reached, to_low, to_guess)
            to_high = tl.where(reached, to_guess, to_high)
        kept, tail_kept = bits >= low, tail_bits >= low
        tied, tail_tied = (bits == low).to(tl.int32), (tail_bits == low).to(tl.int32)
        ties_before_tail = tl.sum(tied, axis=0)
        ties = ties_before_tail + tl.sum(tail_tied, axis=0)
        # Of equal weights those that come first are dropped first, as a stable sort has it.
        if ties > 1:
            to_low, _, _ = _split_at(bits, low - 1, BY_COUNT)
            tail_to_low, _, _ = _split_at(tail_bits, low - 1, BY_COUNT)
            missing = bound - to_low - tail_to_low
            rank, tail_rank = tl.cumsum(tied, axis=0), ties_before_tail + tl.cumsum(tail_tied, axis=0)
            kept = kept & _is_kept(tied, rank, ties, low, missing, BY_COUNT)
            tail_kept = tail_kept & _is_kept(tail_tied, tail_rank, ties, low, missing, BY_COUNT)
        # Columns outside of the row have bits above any, and were kept until here.
        kept, tail_kept = kept & (column < blocks), tail_kept & (tail_column < blocks)
        if window is not None:
            window += query * blocks
            kept = kept | (tl.load(window + column, mask=column < blocks, other=0) != 0)
            tail_kept = tail_kept | (tl.load(window + tail_column, mask=tail_column < blocks, other=0) != 0)
        counts, indices = lists_at(counts, indices, counts_batch, indices_batch, blocks)
        stored = append(kept, column, 0, blocks, full, indices, indices_part)
        stored = append(tail_kept, tail_column, stored, blocks, full, indices, indices_part)
        close(stored, full, counts, indices, counts_part, indices_part)

    @triton.jit
    def _is_kept(tied, rank, ties, low, missing, BY_COUNT: tl.constexpr):
        """Which of the entries that tie at the least kept weight are kept, by their rank among them."""
        # A row's most probable block stays whatever rounding does to the sum; of several the last.
        last = (low == GREATEST) & (rank == ties)
        return (tied == 0) | last | (rank * _measure(low, BY_COUNT) >= missing)
