"""Lists of the blocks that a block map's rows keep, on a GPU: the rule of `nabla.selection` without sorting.

Each program holds one row of the map in registers. The least kept weight is found by bisecting on the bits of
non-negative floats, whose order is that of their values, so that the search is exact.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nabla.kernels.block_lists import ENTRIES_A_WARP
from nabla.kernels.gpu import tl, triton

# Of a thread. Of a multiprocessor's 65,536 that is eight rows of four warps at once, or sixteen of two.
REGISTERS = 64


class Rule(NamedTuple):
    """By what blocks are kept, as `nabla.selection.Selection` has it, and how they are listed.

    full: (N,) bool, if there are to be two lists, of these key tiles and of the others
    exactly: of the selection its count
    """

    full: Tensor | None = None
    cut: Tensor | None = None
    exactly: Tensor | None = None
    least: Tensor | None = None
    most: Tensor | None = None
    window: Tensor | None = None


def lists_of_map(block_map: Tensor, rule: Rule, counts: Tensor, indices: Tensor, is_probability: bool = False) -> None:
    """Write the lists of a block map (B, heads, N, N) float32 and contiguous.

    counts, indices: to write, as `nabla::select_lists` returns them, or a slice of their heads
    is_probability: whether the map is after its softmax already
    """
    batch, heads, blocks, _ = block_map.shape
    # The greatest power of two that is not above `blocks`; the tail takes what is beyond it.
    width = 1 << (blocks.bit_length() - 1)
    _select_row[(blocks, heads, batch)](
        block_map,
        rule.cut if rule.exactly is None else rule.exactly,
        rule.least,
        rule.most,
        rule.window,
        rule.full,
        counts,
        indices,
        *counts.stride()[:2],
        *indices.stride()[:2],
        blocks,
        HEAD=width,
        TAIL=triton.next_power_of_2(max(1, blocks - width)),
        BY_COUNT=rule.exactly is not None,
        IS_PROBABILITY=is_probability,
        num_warps=max(1, width // ENTRIES_A_WARP),
        maxnreg=REGISTERS,
    )


if triton is not None:
    from nabla.kernels.block_lists import append, close, lists_at

    ONE = tl.constexpr(1065353216)  # the bits of 1.0
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
    def _load_row(row, column, blocks):
        """Entries of a row, -inf outside of it, with their greatest and least."""
        inside = column < blocks
        score = tl.load(row + column, mask=inside, other=float("-inf"))
        greatest, least = tl.reduce((score, tl.where(inside, score, float("inf"))), 0, _max_and_min)
        return score, greatest, least

    @triton.jit
    def _split_at(bits, guess, BY_COUNT: tl.constexpr):
        """The measure of the entries up to a guess, the greatest of them, and the least above it."""
        below = bits <= guess
        measures = tl.where(below, _measure(bits, BY_COUNT), 0.0)
        return tl.reduce((measures, tl.where(below, bits, 0), tl.where(below, OUTSIDE, bits)), 0, _sum_max_and_min)

    @triton.jit
    def _least_kept(bits, tail_bits, low, high, total, bound, BY_COUNT: tl.constexpr):
        """The bits of a row's least kept entry, from those of its least and greatest.

        It is the first whose measure, with that of all below it, reaches the bound; all together measure `total`.
        """
        # It lies between the entries `low` and `high`. Guesses are where the bound lies between the measures up to
        # these, and every other time halfway from there to the middle, so that they close in from both sides.
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
        return low

    @triton.jit
    def _keep(bits, tail_bits, least, greatest, total, bound, BY_COUNT: tl.constexpr):
        """Which entries of a row are kept: going up, those from where the running measure reaches the bound.

        least, greatest: the bits of the row's least and greatest entry
        total: the measure of all of its entries
        Columns outside of the row are kept too.
        """
        low = _least_kept(bits, tail_bits, least, greatest, total, bound, BY_COUNT)
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
            # A row's most probable block stays whatever rounding does to the sum; of several the last.
            last = tl.where(low == greatest, ties, -1)
            kept = kept & _is_kept(tied, rank, last, low, missing, BY_COUNT)
            tail_kept = tail_kept & _is_kept(tail_tied, tail_rank, last, low, missing, BY_COUNT)
        return kept, tail_kept

    @triton.jit
    def _is_kept(tied, rank, last, low, missing, BY_COUNT: tl.constexpr):
        """Which of the entries that tie at the least kept weight are kept, by their rank among them."""
        return (tied == 0) | (rank == last) | (rank * _measure(low, BY_COUNT) >= missing)

    @triton.jit
    def _select_row(
        block_map,
        limit,
        least,
        most,
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
        IS_PROBABILITY: tl.constexpr,
    ):
        # A row is held in two parts, of powers of two: one for both would be up to twice as wide as the row.
        query, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        column, tail_column = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
        row = block_map + ((batch * tl.num_programs(1) + head).to(tl.int64) * blocks + query) * blocks
        score, greatest, least_entry = _load_row(row, column, blocks)
        tail_score, tail_greatest, tail_least = _load_row(row, tail_column, blocks)
        greatest, least_entry = tl.maximum(greatest, tail_greatest), tl.minimum(least_entry, tail_least)
        if IS_PROBABILITY:
            weight, tail_weight = tl.where(column < blocks, score, 0.0), tl.where(tail_column < blocks, tail_score, 0.0)
            least_bits, top = least_entry.to(tl.int32, bitcast=True), greatest.to(tl.int32, bitcast=True)
        else:
            # Not divided by their sum; the bound is multiplied by it instead.
            weight, tail_weight = tl.exp(score - greatest), tl.exp(tail_score - greatest)
            least_bits, top = tl.exp(least_entry - greatest).to(tl.int32, bitcast=True), tl.full((), ONE, tl.int32)
        bits = tl.where(column < blocks, weight.to(tl.int32, bitcast=True), OUTSIDE)
        tail_bits = tl.where(tail_column < blocks, tail_weight.to(tl.int32, bitcast=True), OUTSIDE)
        # By count the measure goes from 1 for the least to `blocks` for the greatest.
        number = tl.full((), 0.0, tl.float32) + blocks
        if BY_COUNT:
            total = number
            bound = total - tl.load(limit).to(tl.float32) + 1.0
        else:
            total = tl.sum(weight, axis=0) + tl.sum(tail_weight, axis=0)
            bound = tl.load(limit) * total
        kept, tail_kept = _keep(bits, tail_bits, least_bits, top, total, bound, BY_COUNT)
        if least is not None or most is not None:
            # In order of probability, so a row that keeps too few or too many keeps the most probable of a number.
            count = tl.sum((kept & (column < blocks)).to(tl.int32), axis=0)
            count += tl.sum((tail_kept & (tail_column < blocks)).to(tl.int32), axis=0)
            wanted = count
            if least is not None:
                wanted = tl.maximum(wanted, tl.load(least).to(tl.int32))
            if most is not None:
                wanted = tl.minimum(wanted, tl.load(most).to(tl.int32))
            if wanted != count:
                bound = number - wanted.to(tl.float32) + 1.0
                kept, tail_kept = _keep(bits, tail_bits, least_bits, top, number, bound, True)
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
