"""The block map of tiles in parts, on a GPU, without a map of parts: two passes over the keys.

The first finds what the softmax of each query part is divided by, going from keys to keys (Milakov and Gimelshein,
arXiv 1805.02867). The second makes the probabilities again, sums those of two tiles in registers, and stores the sums.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nabla.kernels.gpu import tl, triton
from nabla.kernels.halves import halved

# A step of the second pass holds all parts of two tiles at least.
MAX_PARTS = 32
# Heads are read in stretches of at most so many bytes of a row, all of which are held at once.
DEPTH_BYTES = 256


class Options(NamedTuple):
    """How a pass runs.

    rows, columns: query parts of a program, and key parts of each of its steps
    splits: programs that share the keys of some queries, so that those that run last are short
    """

    rows: int
    columns: int
    splits: int
    num_warps: int
    num_stages: int

    @property
    def of_launch(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": self.num_warps, "num_stages": self.num_stages}


# Of both passes, by whether products are of float16. Measured on an H200 for heads of 128 in four parts.
OPTIONS = {
    True: (Options(128, 128, 1, 4, 2), Options(128, 64, 2, 4, 4)),
    False: (Options(64, 64, 1, 4, 2), Options(64, 64, 1, 4, 2)),
}


def part_map(q: Tensor, k: Tensor, part_sizes: Tensor, has_empty_parts: bool, half: bool) -> Tensor:
    """Attention between means of parts (B, heads, N * P, D) float32, by tiles: (B, heads, N, N) float32.

    Summed over the parts of key tiles and averaged over those of query tiles, so that rows sum to one.

    part_sizes: (N, P) int32, how many tokens each part has, P from 2 to `MAX_PARTS`; parts without any do not count
    has_empty_parts: whether there are such
    half: whether products are of float16, which has as many digits as TF32 at twice its speed, else three of TF32,
    which together have float32's precision
    """
    (batch, heads, rows, dim), (blocks, parts) = q.shape, part_sizes.shape
    k_greatest = None
    if half:
        # Of k alone: a program reads q once, and can make float16 of it then.
        k, k_greatest = halved(k)
    depth = min(DEPTH_BYTES // k.element_size(), max(16, triton.next_power_of_2(dim)))
    first, second = _options(half, depth < dim)
    totals = torch.empty(first.splits, batch * heads, rows, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch, heads, blocks, blocks, dtype=torch.float32, device=q.device)
    # Of base two, as exponentials are on a GPU.
    scale = dim**-0.5 / math.log(2)
    given = q, k, k_greatest, part_sizes, totals, *q.stride()[:3], *k.stride()[:3], heads, blocks, scale
    shape = {"PARTS": parts, "HAS_EMPTY": has_empty_parts, "SPLITS": first.splits, "TO_HALF": half}
    shape |= {"DIM": dim, "DEPTH": depth}
    grid = triton.cdiv(rows, first.rows), first.splits, batch * heads
    _add_up_keys[grid](*given, **shape, **first.of_launch)
    # Of a number of parts that is no power of two, such as 3, steps hold places for one more.
    width = triton.next_power_of_2(parts)
    grid = triton.cdiv(blocks * width, second.rows), second.splits, batch * heads
    _sum_by_tiles[grid](*given, sums, **shape, WIDTH=width, **second.of_launch)
    return sums


def _options(half: bool, is_deep: bool) -> tuple[Options, Options]:
    """Those of both passes; is_deep: whether heads are read in several stretches."""
    first, second = OPTIONS[half]
    # All stretches of the keys of a step are held at once, so that fewer steps ahead fit into shared memory.
    return first, second._replace(num_stages=min(2, second.num_stages)) if is_deep else second


if triton is not None:
    from nabla.kernels.halves import greatest_of_rows, load_rows, power_of, queries

    @triton.jit
    def _products(
        a, q, q_at, q_row, greatest, k, k_at, k_row, TO_HALF: tl.constexpr, DIM: tl.constexpr, DEPTH: tl.constexpr
    ):
        """Of query rows, whose first numbers are `a` already, with key rows."""
        # Of float16 this says nothing.
        PRECISION: tl.constexpr = "tf32x3"
        total = tl.dot(a, tl.trans(load_rows(k, k_at, k_row, 0, DIM, DEPTH)), input_precision=PRECISION)
        for start in tl.static_range(DEPTH, DIM, DEPTH):
            more = queries(q, q_at, q_row, greatest, start, TO_HALF, DIM, DEPTH)
            total = tl.dot(
                more, tl.trans(load_rows(k, k_at, k_row, start, DIM, DEPTH)), total, input_precision=PRECISION
            )
        return total

    @triton.jit
    def _head(x, batch_stride, head_stride, heads):
        of = tl.program_id(2)
        return x + (of // heads).to(tl.int64) * batch_stride + (of % heads).to(tl.int64) * head_stride

    @triton.jit
    def _scales(greatest, k_greatest, scale, TO_HALF: tl.constexpr):
        """Of each query row's products, whatever powers of two it and the head's keys were multiplied by."""
        scales = tl.zeros(greatest.shape, tl.float32) + scale
        if TO_HALF:
            scales *= power_of(greatest, -1) * power_of(tl.load(k_greatest + tl.program_id(2)), -1)
        return scales

    @triton.jit
    def _stretch(number, COLUMNS: tl.constexpr):
        """The part of `number` columns, from and to, that a program does of those which share them."""
        steps = tl.cdiv(tl.cdiv(number, COLUMNS), tl.num_programs(1)) * COLUMNS
        return tl.program_id(1) * steps, tl.minimum((tl.program_id(1) + 1) * steps, number)

    @triton.jit
    def _add_keys(greatest, total, score, scale):
        """The greatest score of each row and the sum of exponentials relative to it, with some keys more."""
        more = tl.maximum(greatest, tl.max(score, axis=1))
        weight = tl.exp2(score * scale[:, None] - (more * scale)[:, None])
        return more, total * tl.exp2((greatest - more) * scale) + tl.sum(weight, axis=1)

    @triton.jit
    def _add_up_keys(
        q,
        k,
        k_greatest,
        part_sizes,
        totals,
        q_batch,
        q_head,
        q_row,
        k_batch,
        k_head,
        k_row,
        heads,
        blocks,
        scale,
        PARTS: tl.constexpr,
        HAS_EMPTY: tl.constexpr,
        SPLITS: tl.constexpr,
        TO_HALF: tl.constexpr,
        DIM: tl.constexpr,
        DEPTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """The logarithm of the sum of each query part's exponentials, over a stretch of keys."""
        rows = blocks * PARTS
        q, k = _head(q, q_batch, q_head, heads), _head(k, k_batch, k_head, heads)
        row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        at = tl.minimum(row, rows - 1)
        row_greatest = greatest_of_rows(q, at, q_row, TO_HALF, DIM, DEPTH)
        scale = _scales(row_greatest, k_greatest, scale, TO_HALF)
        a = queries(q, at, q_row, row_greatest, 0, TO_HALF, DIM, DEPTH)
        greatest, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
        first, last = _stretch(rows, COLUMNS)
        # The last keys are apart, so that all others need no mask.
        whole = last if HAS_EMPTY else first + (last - first) // COLUMNS * COLUMNS
        for start in range(first, whole, COLUMNS):
            key = start + column
            if HAS_EMPTY:
                key = tl.minimum(key, rows - 1)
            score = _products(a, q, at, q_row, row_greatest, k, key, k_row, TO_HALF, DIM, DEPTH)
            if HAS_EMPTY:
                # A tile's first part never is, so that no step is without a key.
                counted = (tl.load(part_sizes + key) > 0) & (start + column < rows)
                score = tl.where(counted[None, :], score, float("-inf"))
            greatest, total = _add_keys(greatest, total, score, scale)
        if whole < last:
            key = tl.minimum(whole + column, rows - 1)
            score = _products(a, q, at, q_row, row_greatest, k, key, k_row, TO_HALF, DIM, DEPTH)
            score = tl.where((whole + column < rows)[None, :], score, float("-inf"))
            greatest, total = _add_keys(greatest, total, score, scale)
        totals += (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * rows
        # -inf where a stretch has no keys.
        tl.store(totals + row, greatest * scale + tl.log2(total), mask=row < rows)

    @triton.jit
    def _sum_of_splits(totals, row, rows, SPLITS: tl.constexpr):
        """The logarithms of sums of all keys, from those of stretches of them."""
        totals += tl.program_id(2).to(tl.int64) * rows
        split = tl.num_programs(2).to(tl.int64) * rows
        greatest = tl.load(totals + row)
        for n in tl.static_range(1, SPLITS):
            greatest = tl.maximum(greatest, tl.load(totals + n * split + row))
        total = tl.zeros(row.shape, tl.float32)
        for n in tl.static_range(SPLITS):
            total += tl.exp2(tl.load(totals + n * split + row) - greatest)
        return greatest + tl.log2(total)

    @triton.jit
    def _sum_by_tiles(
        q,
        k,
        k_greatest,
        part_sizes,
        totals,
        q_batch,
        q_head,
        q_row,
        k_batch,
        k_head,
        k_row,
        heads,
        blocks,
        scale,
        sums,
        PARTS: tl.constexpr,
        HAS_EMPTY: tl.constexpr,
        SPLITS: tl.constexpr,
        TO_HALF: tl.constexpr,
        DIM: tl.constexpr,
        DEPTH: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """Probabilities of some query tiles, over a stretch of key tiles, summed by tiles."""
        TILES: tl.constexpr = ROWS // WIDTH
        KEY_TILES: tl.constexpr = COLUMNS // WIDTH
        # Rows and columns are in such an order that all parts of a tile belong to one thread, as far as tensor cores
        # give results: to a thread rows 8 apart, and those of another turn of all warps; two columns side by side, and
        # those 8 apart. So the sums need no exchange between threads. Any order is right, though.
        NEAR: tl.constexpr = min(8, TILES)
        FAR: tl.constexpr = TILES // NEAR
        KEY_NEAR: tl.constexpr = min(4, KEY_TILES)
        KEY_FAR: tl.constexpr = KEY_TILES // KEY_NEAR
        HALF: tl.constexpr = WIDTH // 2
        # Rows are (HALF, FAR, 2, NEAR): of a part HALF and 2, of a tile the others.
        row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        part = row // (2 * TILES) * 2 + row // NEAR % 2
        tile = tl.program_id(0) * TILES + row // (2 * NEAR) % FAR * NEAR + row % NEAR
        # Columns are (KEY_FAR, HALF, KEY_NEAR, 2).
        key_part = column // (2 * KEY_NEAR) % HALF * 2 + column % 2
        key_tile = column // (WIDTH * KEY_NEAR) * KEY_NEAR + column // 2 % KEY_NEAR
        q, k = _head(q, q_batch, q_head, heads), _head(k, k_batch, k_head, heads)
        at = tl.minimum(tile, blocks - 1) * PARTS + tl.minimum(part, PARTS - 1)
        row_greatest = greatest_of_rows(q, at, q_row, TO_HALF, DIM, DEPTH)
        scale = _scales(row_greatest, k_greatest, scale, TO_HALF)
        a = queries(q, at, q_row, row_greatest, 0, TO_HALF, DIM, DEPTH)
        # A mean over the query parts that count, by what their probabilities are divided by.
        total = _sum_of_splits(totals, at, blocks * PARTS, SPLITS) + tl.log2(
            _parts_that_count(part_sizes, at // PARTS, PARTS, HAS_EMPTY, WIDTH)
        )
        counted = part < PARTS
        if HAS_EMPTY:
            counted = counted & (tl.load(part_sizes + at) > 0)
        total = tl.where(counted, total, float("inf"))
        to_tile, to_key_tile = tl.program_id(0) * TILES + tl.arange(0, TILES), tl.arange(0, KEY_TILES)
        sums += tl.program_id(2).to(tl.int64) * blocks * blocks
        first, last = _stretch(blocks, KEY_TILES)
        for start in range(first, last, KEY_TILES):
            key_at = tl.minimum(start + key_tile, blocks - 1) * PARTS + tl.minimum(key_part, PARTS - 1)
            score = _products(a, q, at, q_row, row_greatest, k, key_at, k_row, TO_HALF, DIM, DEPTH)
            weight = tl.exp2(score * scale[:, None] - total[:, None])
            weight = tl.reshape(weight, (HALF, FAR, 2, NEAR, COLUMNS))
            weight = tl.sum(tl.sum(weight, axis=2), axis=0)
            if HAS_EMPTY or PARTS < WIDTH:
                # After the sum over query parts, of which there are fewer then.
                key_counted = (key_part < PARTS) & (tl.load(part_sizes + key_at) > 0)
                weight = tl.where(key_counted[None, None, :], weight, 0.0)
            weight = tl.reshape(weight, (FAR, NEAR, KEY_FAR, HALF, KEY_NEAR, 2))
            weight = tl.reshape(tl.sum(tl.sum(weight, axis=5), axis=3), (TILES, KEY_TILES))
            inside = (to_tile < blocks)[:, None] & (start + to_key_tile < blocks)[None, :]
            tl.store(sums + to_tile[:, None] * blocks + start + to_key_tile[None, :], weight, mask=inside)

    @triton.jit
    def _parts_that_count(part_sizes, tile, PARTS: tl.constexpr, HAS_EMPTY: tl.constexpr, WIDTH: tl.constexpr):
        """How many parts of each tile have tokens, float32."""
        if HAS_EMPTY:
            part = tl.arange(0, WIDTH)
            size = tl.load(part_sizes + tile[:, None] * PARTS + part, mask=(part < PARTS)[None, :], other=0)
            return tl.sum((size > 0).to(tl.float32), axis=1)
        else:
            return tl.full(tile.shape, PARTS, tl.float32)
