"""Which key blocks each query block keeps, chosen from the content (NABLA, arXiv 2507.13546, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla.config import NablaConfig
from nabla.tiling import TileLayout
from nabla.window import window_mask

# Sorting a map costs 12 bytes an entry beside it; heads are taken in groups of at most this many entries.
MAP_ENTRIES = 2**27


@torch.no_grad()
def block_means(x: Tensor, layout: TileLayout) -> Tensor:
    """Mean of each block's valid tokens: (B, heads, N * block, D) in tile order -> (B, heads, N, D) float32."""
    tokens = x.unflatten(2, (layout.blocks, layout.block)).float()
    sums = (tokens * layout.valid[..., None]).sum(dim=3)
    return sums / layout.sizes[:, None]


def block_map(q: Tensor, k: Tensor) -> Tensor:
    """Attention between block means (B, heads, N, D), in float32: (B, heads, N, N), each row summing to one."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1)


def top_p_mask(probability: Tensor, cut: Tensor) -> Tensor:
    """Smallest set of blocks a row whose probability reaches 1 - cut; bool, the shape of `probability`.

    Blocks are dropped from the least probable up, the lower-numbered first where two are equal, while the running
    sum stays below `cut`. A row's most probable block always stays.
    """
    ascending, order = probability.sort(dim=-1, stable=True)
    # From the least probable up, as the published program sums; the sum from the other end rounds otherwise.
    return _unsort(ascending.cumsum(dim=-1) >= cut, order)


def top_k_mask(probability: Tensor, count: Tensor) -> Tensor:
    """The `count` most probable blocks of every row, the higher-numbered first where two are equal; bool."""
    order = probability.sort(dim=-1, stable=True).indices
    rank = torch.arange(probability.shape[-1], device=probability.device)
    return _unsort((rank >= probability.shape[-1] - count).expand_as(order), order)


def _unsort(kept: Tensor, order: Tensor) -> Tensor:
    """Put back in block order what is kept in ascending order of probability; the last one always is."""
    kept = torch.cat((kept[..., :-1], torch.ones_like(kept[..., -1:])), dim=-1)
    return torch.zeros_like(kept).scatter(-1, order, kept)


@dataclass(frozen=True, eq=False)
class Selection:
    """What decides the kept blocks, all but q and k. Build with `Selection.build`.

    The threshold is a tensor, so that compiled code serves every value of it.

    cut: 0-d float32, one minus the threshold, or None
    count: 0-d int64, blocks to keep in every row, or None
    window: (1, 1, N, N) bool, blocks kept besides, or None
    """

    layout: TileLayout
    cut: Tensor | None
    count: Tensor | None
    window: Tensor | None

    @classmethod
    def build(cls, grid: tuple[int, int, int], config: NablaConfig, device: torch.device | str) -> Selection:
        """For a grid of (frames, rows, columns) tokens. The config must not be dense."""
        layout = TileLayout.build(grid, config.tile, device)
        cut = count = window = None
        if config.threshold is not None:
            # Subtracted in float64, and rounded once.
            cut = torch.tensor(1 - config.threshold, dtype=torch.float32, device=device)
        if config.keep is not None:
            count = torch.tensor(blocks_to_keep(config.keep, layout.blocks), device=device)
        if config.window is not None:
            window = window_mask(layout.tiles, config.window, device)[None, None]
        return cls(layout, cut, count, window)

    @property
    def is_fixed(self) -> bool:
        """Whether the window alone decides, whatever q and k."""
        return self.cut is None and self.count is None

    @torch.no_grad()
    def block_mask(self, q: Tensor, k: Tensor) -> Tensor:
        """Which blocks are kept for block means q and k (B, heads, N, D) float32: (B or 1, heads or 1, N, N) bool."""
        if self.is_fixed:
            assert self.window is not None
            return self.window
        # Autocast would round the map to half precision, and other blocks would be chosen.
        with torch.autocast(q.device.type, enabled=False):
            return self._chosen(q, k)

    def _chosen(self, q: Tensor, k: Tensor) -> Tensor:
        heads = max(1, MAP_ENTRIES // (q.shape[0] * self.layout.blocks**2))
        groups = []
        for q_group, k_group in zip(q.split(heads, dim=1), k.split(heads, dim=1)):
            groups.append(self._by_rule(block_map(q_group, k_group)))
        block_mask = torch.cat(groups, dim=1)
        return block_mask if self.window is None else block_mask | self.window

    def _by_rule(self, probability: Tensor) -> Tensor:
        """The mask by threshold or count of a block map (B, heads, N, N)."""
        if self.count is not None:
            return top_k_mask(probability, self.count)
        assert self.cut is not None
        return top_p_mask(probability, self.cut)


def blocks_to_keep(density: float, blocks: int) -> int:
    """The least number of blocks that is at least `density` of them; a density exact up to rounding is exact."""
    return max(1, math.ceil(density * blocks - 1e-9))
