"""Tokens into tile order on a GPU; rotated, and averaged part by part of their tiles, in the same pass over them."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from nabla.kernels.gpu import can_run, tl, triton
from nabla.rotary import Rotary
from nabla.tiling import TileLayout

# Rotation works on pairs of neighbours, so a pair is moved as one integer and taken apart in registers.
PAIR_TYPES = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}
# A program does up to so many pairs of up to so many heads, head after head with the same angles; all fits into
# registers. It does numbers that divide, since masks would cost it a tenth.
HEADS = 8
WIDTH = 16
PAIRS_A_WARP = 256


def applies(x: Tensor, layout: TileLayout) -> bool:
    """Whether this path can gather x (B, S, heads, D); it has no backward."""
    # Ranges of a Triton program are powers of two.
    fits = x.dtype in PAIR_TYPES and x.shape[-1] % 2 == 0 and layout.block & (layout.block - 1) == 0
    return can_run(x) and fits and not (torch.is_grad_enabled() and x.requires_grad)


def tiles_and_means(x: Tensor, layout: TileLayout, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
    """(B, S, heads, D) in raster order -> (B, heads, N * block, D) in tile order, (B, heads, N * P, D) float32 means.

    Equal to `nabla.rotary.rotate`, `layout.to_tiles` and `nabla.selection.block_means`, up to the order of the sums.
    """
    # Every angle stands there twice; the kernel reads one for a pair.
    angles = (None, None) if rotary is None else [angle[..., ::2].contiguous() for angle in rotary]
    # One part has its slots in order.
    slots = None if layout.parts == 1 else layout.part_slots
    tiles, means = _gather(x, layout.source, slots, layout.part_sizes, *angles)
    return tiles.transpose(1, 2), means


@torch.library.custom_op("nabla::gather_tiles", mutates_args=())
def _gather(
    x: Tensor,
    source: Tensor,
    slots: Optional[Tensor],
    sizes: Tensor,
    cos: Optional[Tensor],
    sin: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    tiles, means = _empty(x, source, sizes)
    kind = PAIR_TYPES[x.dtype]
    x_pairs, tile_pairs = x.contiguous().view(kind), tiles.view(kind)
    (batch, _, heads, pairs), (blocks, parts) = x_pairs.shape, sizes.shape
    block, width = source.shape[0] // blocks, math.gcd(WIDTH, pairs)
    together = max(n for n in range(1, HEADS + 1) if heads % n == 0)
    with torch.cuda.device(x.device):
        # Parts of a token run fastest, so that programs side by side read one stretch of memory.
        _gather_tile[(pairs // width * (heads // together), blocks, batch)](
            x_pairs,
            source,
            slots,
            sizes,
            cos,
            sin,
            tile_pairs,
            means,
            *x_pairs.stride()[:2],
            *tile_pairs.stride()[:2],
            heads,
            pairs,
            TYPE=_TYPES[x.dtype],
            BLOCK=block,
            PARTS=parts,
            WIDTH=width,
            CHUNKS=pairs // width,
            HEADS=together,
            # Offsets of 64 bits take two registers each, so they are for tensors that need them.
            OFFSET=tl.int32 if max(x_pairs.numel(), tile_pairs.numel()) < 2**31 else tl.int64,
            num_warps=min(16, max(1, block * width // PAIRS_A_WARP)),
        )
    return tiles, means


@_gather.register_fake
def _(x: Tensor, source: Tensor, slots: Tensor | None, sizes: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty(x, source, sizes)


def _empty(x: Tensor, source: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = x.shape
    # Heads inside, as in x: programs side by side read one stretch of memory and write one.
    tiles = x.new_empty(batch, source.shape[0], heads, dim)
    return tiles, x.new_empty(batch, heads, sizes.numel(), dim, dtype=torch.float32)


if triton is not None:
    _TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

    @triton.jit
    def _unpack(pair, TYPE: tl.constexpr):
        """The two numbers of a pair, in float32."""
        if TYPE.primitive_bitwidth == 32:
            first, second = pair.to(tl.uint32), (pair >> 32).to(tl.uint32)
        else:
            first, second = pair.to(tl.uint16), (pair >> 16).to(tl.uint16)
        return first.to(TYPE, bitcast=True).to(tl.float32), second.to(TYPE, bitcast=True).to(tl.float32)

    @triton.jit
    def _pack(first, second, TYPE: tl.constexpr):
        """The inverse of `_unpack`."""
        # By way of unsigned integers, or the sign of the first would fill the bits of the second.
        if TYPE.primitive_bitwidth == 32:
            low, high = first.to(tl.uint32, bitcast=True).to(tl.int64), second.to(tl.uint32, bitcast=True).to(tl.int64)
            pair = low | (high << 32)
        else:
            low = first.to(TYPE).to(tl.uint16, bitcast=True).to(tl.int32)
            pair = low | (second.to(TYPE).to(tl.uint16, bitcast=True).to(tl.int32) << 16)
        return pair

    @triton.jit
    def _add(first_a, second_a, first_b, second_b):
        return first_a + first_b, second_a + second_b

    @triton.jit
    def _gather_tile(
        x,
        source,
        slots,
        sizes,
        cos,
        sin,
        tiles,
        means,
        from_batch,
        from_token,
        to_batch,
        to_slot,
        heads,
        pairs,
        TYPE: tl.constexpr,
        BLOCK: tl.constexpr,
        PARTS: tl.constexpr,
        WIDTH: tl.constexpr,
        CHUNKS: tl.constexpr,
        HEADS: tl.constexpr,
        OFFSET: tl.constexpr,
    ):
        block, batch = tl.program_id(1), tl.program_id(2)
        row, column = tl.arange(0, BLOCK), tl.program_id(0) % CHUNKS * WIDTH + tl.arange(0, WIDTH)
        if PARTS == 1:
            slot = block * BLOCK + row
            size = tl.load(sizes + block)
            # Valid tokens of a tile come first. The slots behind them repeat one, which is stored but not averaged.
            counted = row[:, None] < size
        else:
            # Rows are (FAR, PARTS, NEAR), so that those of a part are a warp's own, which reads eight rows at a time:
            # its sums need no other.
            NEAR: tl.constexpr = min(8, BLOCK // PARTS)
            FAR: tl.constexpr = BLOCK // (PARTS * NEAR)
            part, place = row // NEAR % PARTS, row // (PARTS * NEAR) * NEAR + row % NEAR
            slot = tl.load(slots + block * BLOCK + part * (BLOCK // PARTS) + place)
            counted = (place < tl.load(sizes + block * PARTS + part))[:, None]
            size = tl.maximum(tl.load(sizes + block * PARTS + tl.arange(0, PARTS)), 1)
        token = tl.load(source + slot).to(OFFSET)
        # (BLOCK, WIDTH) pairs: tokens of the tile by a part of a head.
        here = token[:, None] * from_token + column[None, :]
        there = slot.to(OFFSET)[:, None] * to_slot + column[None, :]
        x += batch.to(tl.int64) * from_batch
        tiles += batch.to(tl.int64) * to_batch
        if cos is not None:
            angle = token[:, None] * pairs + column[None, :]
            c, s = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
        for n in range(HEADS):
            head = tl.program_id(0) // CHUNKS * HEADS + n
            pair = tl.load(x + head * pairs + here)
            first, second = _unpack(pair, TYPE)
            if cos is not None:
                # Unpacked again, so that means are of tokens as they are stored, rounded, as `block_means` has them.
                pair = _pack(first * c - second * s, first * s + second * c, TYPE)
                first, second = _unpack(pair, TYPE)
            tl.store(tiles + head * pairs + there, pair)
            number = (batch * heads + head).to(tl.int64) * tl.num_programs(1) + block
            first, second = tl.where(counted, first, 0.0), tl.where(counted, second, 0.0)
            if PARTS == 1:
                first_sum, second_sum = tl.reduce((first, second), 0, _add)
                mean = means + 2 * (number * pairs + column)
                tl.store(mean, first_sum / size)
                tl.store(mean + 1, second_sum / size)
            else:
                first, second = _by_part(first, FAR, PARTS, NEAR, WIDTH), _by_part(second, FAR, PARTS, NEAR, WIDTH)
                to = number * PARTS + tl.arange(0, PARTS)
                mean = means + 2 * (to[:, None] * pairs + column)
                tl.store(mean, first / size[:, None])
                tl.store(mean + 1, second / size[:, None])

    @triton.jit
    def _by_part(x, FAR: tl.constexpr, PARTS: tl.constexpr, NEAR: tl.constexpr, WIDTH: tl.constexpr):
        """Sums of the rows of each part, (PARTS, WIDTH)."""
        return tl.sum(tl.sum(tl.reshape(x, (FAR, PARTS, NEAR, WIDTH)), axis=2), axis=0)
