"""Means in float16 on a GPU, by powers of two with which they fit: keys once, a head by one; queries as they are read,
a row by one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nabla.kernels.gpu import tl, triton

ENTRIES = 4096


class Halves(NamedTuple):
    """Numbers that are `values` times a power of two, one a head.

    values: (B, heads, rows, D) float16
    greatest: (B, heads) int32, the bits of a head's greatest magnitude in float32, which the power is found by
    """

    values: Tensor
    greatest: Tensor


def halved(x: Tensor) -> Halves:
    """(B, heads, rows, D) float32, numbers of a row side by side, in float16."""
    batch, heads, rows, dim = x.shape
    # Bits of floats that are not negative are ordered as the floats are, and integers have an atomic maximum.
    greatest = torch.zeros(batch, heads, dtype=torch.int32, device=x.device)
    values = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    depth = triton.next_power_of_2(dim)
    tile = max(1, ENTRIES // depth)
    grid = triton.cdiv(rows, tile), batch * heads
    shape = {"DIM": dim, "DEPTH": depth, "ROWS": tile}
    _find_greatest[grid](x, greatest, *x.stride()[:3], heads, rows, **shape)
    _halve[grid](x, greatest, values, *x.stride()[:3], heads, rows, **shape)
    return Halves(values, greatest)


if triton is not None:
    # The greatest magnitude of a head becomes one of 2**13 to 2**14: far below what float16 holds, and so far above the
    # least it holds that small numbers keep their digits.
    EXPONENT = tl.constexpr(13)
    # What float32 adds to an exponent, and the bits behind it.
    BIAS, MANTISSA = tl.constexpr(127), tl.constexpr(23)

    @triton.jit
    def power_of(greatest, SIGN: tl.constexpr):
        """The power of two that makes float16 of numbers, or with a sign of -1 these again.

        greatest: the bits of their greatest magnitude in float32
        """
        # Kept where neither power is infinite or zero.
        exponent = tl.minimum(tl.maximum((greatest >> MANTISSA) - BIAS, -100), 100)
        return (((exponent - EXPONENT) * -SIGN + BIAS) << MANTISSA).to(tl.float32, bitcast=True)

    @triton.jit
    def load_rows(x, row, stride, START: tl.constexpr, DIM: tl.constexpr, DEPTH: tl.constexpr):
        """(rows, DEPTH) numbers of heads from START on, and zeros behind a head's end."""
        at = START + tl.arange(0, DEPTH)
        if START + DEPTH <= DIM:
            return tl.load(x + row[:, None] * stride + at)
        else:
            return tl.load(x + row[:, None] * stride + at, mask=(at < DIM)[None, :], other=0.0)

    @triton.jit
    def greatest_of_rows(q, at, q_row, TO_HALF: tl.constexpr, DIM: tl.constexpr, DEPTH: tl.constexpr):
        """The bits of each query row's greatest magnitude, by which float16 is made of it; zeros where none is."""
        greatest = tl.zeros(at.shape, tl.float32)
        if TO_HALF:
            for start in tl.static_range(0, DIM, DEPTH):
                greatest = tl.maximum(greatest, tl.max(tl.abs(load_rows(q, at, q_row, start, DIM, DEPTH)), axis=1))
        return greatest.to(tl.int32, bitcast=True)

    @triton.jit
    def queries(
        q, at, q_row, greatest, START: tl.constexpr, TO_HALF: tl.constexpr, DIM: tl.constexpr, DEPTH: tl.constexpr
    ):
        """(rows, DEPTH) numbers of query rows, as they are multiplied."""
        x = load_rows(q, at, q_row, START, DIM, DEPTH)
        return (x * power_of(greatest, 1)[:, None]).to(tl.float16) if TO_HALF else x

    @triton.jit
    def _rows(x, x_batch, x_head, x_row, heads, rows, DIM: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr):
        """Some rows of a head, (ROWS, DEPTH), where they stand in a head of contiguous rows, and which are there."""
        of, row, at = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, DEPTH)
        x += (of // heads).to(tl.int64) * x_batch + (of % heads).to(tl.int64) * x_head
        inside = (row < rows) & (at < DIM)
        return tl.load(x + row * x_row + at, mask=inside, other=0.0), row * DIM + at, inside

    @triton.jit
    def _find_greatest(
        x,
        greatest,
        x_batch,
        x_head,
        x_row,
        heads,
        rows,
        DIM: tl.constexpr,
        DEPTH: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        x, _, _ = _rows(x, x_batch, x_head, x_row, heads, rows, DIM, DEPTH, ROWS)
        most = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
        tl.atomic_max(greatest + tl.program_id(1), most.to(tl.int32, bitcast=True))

    @triton.jit
    def _halve(
        x,
        greatest,
        values,
        x_batch,
        x_head,
        x_row,
        heads,
        rows,
        DIM: tl.constexpr,
        DEPTH: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        x, at, inside = _rows(x, x_batch, x_head, x_row, heads, rows, DIM, DEPTH, ROWS)
        x *= power_of(tl.load(greatest + tl.program_id(1)), 1)
        values += tl.program_id(1).to(tl.int64) * rows * DIM
        tl.store(values + at, x.to(tl.float16), mask=inside)
