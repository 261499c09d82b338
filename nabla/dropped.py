"""Means in place of the blocks that a query drops: one key and one value a tile, which count for all of its tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nabla.tiling import TileLayout

# Pairs of a query and a mean scored at once, a few numbers of float32 each.
PAIRS = 2**26


class TileMeans(NamedTuple):
    """Mean keys and values of tiles, (B, heads, N, D), over their valid tokens, and how many these are, (N,) int32."""

    k: Tensor
    v: Tensor
    sizes: Tensor


def tile_means(tiles: Tensor, part_means: Tensor, layout: TileLayout) -> Tensor:
    """Means (B, heads, N, D) of tiles (B, heads, N * block, D), at least in float32.

    part_means: those of their parts, (B, heads, N * P, D) float32, which are read instead of the tiles where they say
        as much: they have no gradient, and are less exact than float64
    """
    if tiles.dtype == torch.float64 or (torch.is_grad_enabled() and tiles.requires_grad):
        tokens = tiles.unflatten(2, (layout.blocks, layout.block)).to(wide(tiles.dtype))
        return (tokens * layout.valid[..., None]).sum(dim=3) / layout.sizes[:, None]
    if layout.parts == 1:
        return part_means
    by_part = part_means.unflatten(2, layout.part_sizes.shape)
    return (by_part * layout.part_sizes[..., None]).sum(dim=3) / layout.sizes[:, None]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to weigh means in: logarithms of their sizes are rounded too much by a half-precision one."""
    return torch.promote_types(dtype, torch.float32)


def join_means(q: Tensor, out: Tensor, log_sums: Tensor, kept: Tensor, means: TileMeans) -> Tensor:
    """The attention `out` of q over the kept blocks, (B, heads, N * block, D) both, joined by means of all others.

    log_sums: (B, heads, N * block), the natural logarithm of the sum of each query's exponentials over kept blocks
    kept: (B or 1, heads or 1, N, N) bool
    In groups of heads and of blocks, so that memory is bounded.
    """
    batch, heads, length, _ = q.shape
    blocks = kept.shape[-1]
    block, kept = length // blocks, kept.expand(batch, heads, -1, -1)
    head_group = max(1, PAIRS // (batch * length * blocks))
    row_group = max(1, PAIRS // (batch * head_group * block * blocks))
    by_head = []
    for head in range(0, heads, head_group):
        h = slice(head, head + head_group)
        of_heads = TileMeans(means.k[:, h], means.v[:, h], means.sizes)
        rows = []
        for row in range(0, blocks, row_group):
            r = slice(row * block, (row + row_group) * block)
            rows.append(_join(q[:, h, r], out[:, h, r], log_sums[:, h, r], kept[:, h, row : row + row_group], of_heads))
        by_head.append(torch.cat(rows, dim=2))
    return torch.cat(by_head, dim=1)


def _join(q: Tensor, out: Tensor, log_sums: Tensor, kept: Tensor, means: TileMeans) -> Tensor:
    """`join_means` for some rows of blocks: kept (B, heads, rows, N)."""
    exact = wide(q.dtype)
    k, v = means.k.to(exact), means.v.to(exact)
    scores = q.to(exact) @ k.mT * q.shape[-1] ** -0.5 + means.sizes.to(exact).log()
    scores = scores.masked_fill(kept.repeat_interleave(q.shape[2] // kept.shape[2], dim=2), -math.inf)
    log_sums = log_sums.to(exact)
    # Where nothing is dropped, the second is -inf.
    total = torch.logaddexp(log_sums, scores.logsumexp(dim=-1))
    share = (log_sums - total).exp()[..., None]
    return (share * out + (scores - total[..., None]).exp() @ v).to(q.dtype)
