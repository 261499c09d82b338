"""Raster tokens of a (frames, rows, columns) grid to tiles and back, for any grid.

Edge tiles that the grid does not fill are partial: their valid tokens come first, and the slots after them are
padding that repeats the tile's first token, so that it is finite everywhere and never counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla.checks import InputError, is_count


@dataclass(frozen=True, eq=False)
class TileLayout:
    """Where each token of a grid sits in tile order. Build with `TileLayout.build`.

    source: (N * block,) int64, the raster token that fills each slot
    slot: (S,) int64, the slot of each raster token
    sizes: (N,) int32, valid tokens of each tile
    valid: (N, block) bool, which slots hold a token
    full: (N,) bool, which tiles have no padding
    pool: (frames, rows, columns) of tokens of a part of a tile; parts of a tile are numbered in raster order
    part: (N * block,) int32, the part that each slot is of; of padding that of the slot's place
    part_sizes: (N, parts) int32, valid tokens of each part, 0 where the grid ends before it
    part_slots: (N * block,) int64, the slots of each part one after the other, as many as a full part has, those of
        valid tokens first
    """

    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    pool: tuple[int, int, int]
    source: Tensor
    slot: Tensor
    sizes: Tensor
    valid: Tensor
    full: Tensor
    part: Tensor
    part_sizes: Tensor
    part_slots: Tensor

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Tiles along frames, rows and columns; blocks are numbered in raster order of these."""
        frames, rows, columns = (math.ceil(n / t) for n, t in zip(self.grid, self.tile))
        return frames, rows, columns

    @property
    def blocks(self) -> int:
        return math.prod(self.tiles)

    @property
    def block(self) -> int:
        return math.prod(self.tile)

    @property
    def parts(self) -> int:
        """Parts of a tile."""
        return self.part_sizes.shape[1]

    @property
    def has_partial_tiles(self) -> bool:
        return self.blocks * self.block != math.prod(self.grid)

    @property
    def has_empty_parts(self) -> bool:
        """Whether the grid ends before some part of its last tiles."""
        axes = zip(self.grid, self.tile, self.pool)
        return any(math.ceil(tokens / part) % (tile // part) for tokens, tile, part in axes)

    @staticmethod
    def check_grid(grid: Sequence[int]) -> tuple[int, int, int]:
        """A grid as a tuple; raises `InputError` unless it is three positive integers."""
        if len(grid) != 3 or not all(is_count(n) and n > 0 for n in grid):
            raise InputError(f"grid {tuple(grid)} is not three positive integers (frames, rows, columns) of tokens")
        frames, rows, columns = grid
        return frames, rows, columns

    @classmethod
    def build(
        cls,
        grid: tuple[int, int, int],
        tile: tuple[int, int, int],
        device: torch.device | str,
        pool: tuple[int, int, int] | None = None,
    ) -> TileLayout:
        """Lay out a grid of (frames, rows, columns) tokens on `device`; raises `InputError` for any other grid.

        pool: of a part, which divides the tile; None for parts that are whole tiles
        """
        grid = cls.check_grid(grid)
        t, h, w = tile
        tiled = _tokens_of_tiles(grid, (t, h, w))
        # Valid tokens first, in raster order: cuDNN and our own gather are given a count for each tile and no mask.
        valid_first = (tiled < 0).to(torch.int8).argsort(dim=1, stable=True)
        tiled = tiled.gather(1, valid_first)
        valid = tiled >= 0
        # Padding has a source too, so that one gather fills all slots.
        source = torch.where(valid, tiled, tiled[:, :1]).flatten()
        slot = torch.empty(math.prod(grid), dtype=torch.int64)
        slot[tiled[valid]] = valid.flatten().nonzero().squeeze(1)
        part = _parts_of_places((t, h, w), pool or tile)[valid_first]
        part_sizes = torch.stack([((part == n) & valid).sum(1) for n in range(int(part.max()) + 1)], dim=1)
        # Within a tile by part, padding last in each; places of a part are as many as it has tokens where it is full.
        by_part = (2 * part + ~valid).argsort(dim=1, stable=True)
        part_slots = by_part + torch.arange(len(tiled))[:, None] * tiled.shape[1]
        return cls(
            grid,
            (t, h, w),
            pool or (t, h, w),
            source=source.to(device),
            slot=slot.to(device),
            sizes=valid.sum(1, dtype=torch.int32).to(device),
            valid=valid.to(device),
            full=valid.all(1).to(device),
            part=part.flatten().to(device, torch.int32),
            part_sizes=part_sizes.to(device, torch.int32),
            part_slots=part_slots.flatten().to(device),
        )

    def to_tiles(self, x: Tensor) -> Tensor:
        """(B, S, heads, D) in raster order -> (B, heads, N * block, D) in tile order. Padding has no gradient."""
        return _move(x, self.source, self.slot, None).transpose(1, 2)

    def to_raster(self, x: Tensor) -> Tensor:
        """(B, heads, N * block, D) in tile order -> (B, S, heads, D) in raster order, padding dropped."""
        # Padding names a token as its source, whose gradient it must not take.
        valid = self.valid.flatten() if self.has_partial_tiles else None
        return _move(x.transpose(1, 2), self.slot, self.source, valid)


def _tokens_of_tiles(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> Tensor:
    """The raster numbers of each tile's tokens, both in raster order, -1 for padding: (tiles, block) int64."""
    (frames, rows, columns), (t, h, w) = grid, tile
    tokens = torch.arange(math.prod(grid)).view(grid)
    tokens = F.pad(tokens, (0, -columns % w, 0, -rows % h, 0, -frames % t), value=-1)
    n_t, n_h, n_w = (n // m for n, m in zip(tokens.shape, tile))
    return tokens.view(n_t, t, n_h, h, n_w, w).permute(0, 2, 4, 1, 3, 5).reshape(-1, t * h * w)


def _parts_of_places(tile: tuple[int, int, int], pool: tuple[int, int, int]) -> Tensor:
    """The part that each place of a tile is of, both in raster order: (block,) int64."""
    number = torch.zeros((), dtype=torch.int64)
    for axis, (tokens, size) in enumerate(zip(tile, pool)):
        along = (torch.arange(tokens) // size).view([-1 if n == axis else 1 for n in range(3)])
        number = number * (tokens // size) + along
    return number.flatten()


def _move(x: Tensor, to: Tensor, back: Tensor, valid: Tensor | None) -> Tensor:
    """x (B, from, heads, D) at the indices `to`; gradients at `back`, and zero where not `valid`."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Move.apply(x, to, back, valid)
    return x.index_select(1, to)


class _Move(torch.autograd.Function):
    """The gradient of a gather as another gather: that of `index_select` adds token by token, atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Tensor, back: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, valid)
        return x.index_select(1, to)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back, valid = ctx.saved_tensors
        gradient = gradient.index_select(1, back)
        return gradient if valid is None else gradient.masked_fill(~valid[:, None, None], 0), None, None, None
