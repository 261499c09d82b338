"""Which key blocks each query block keeps, chosen from the content (NABLA, arXiv 2507.13546, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla.checks import InputError
from nabla.config import NablaConfig
from nabla.tiling import TileLayout
from nabla.window import window_mask

# Sorting a map costs 12 bytes an entry beside it; heads are taken in groups of at most this many entries.
MAP_ENTRIES = 2**27


@torch.no_grad()
def block_means(x: Tensor, layout: TileLayout) -> Tensor:
    """Mean of the valid tokens of each part of a block: (B, heads, N * block, D) in tile order -> (B, heads, N * P, D).

    P parts a block, one where nothing is said of `pool`. In float32; 0 for a part that has no token.
    """
    if layout.parts > 1:
        x = x.index_select(2, layout.part_slots)
    sizes = layout.part_sizes.flatten()
    tokens = x.unflatten(2, (len(sizes), -1)).float()
    valid = torch.arange(tokens.shape[3], device=x.device) < sizes[:, None]
    return (tokens * valid[..., None]).sum(dim=3) / sizes.clamp(min=1)[:, None]


def block_map(q: Tensor, k: Tensor, q_sizes: Tensor | None = None, k_sizes: Tensor | None = None) -> Tensor:
    """Attention between means of parts (B, heads, N * P, D), summed by key block and averaged by query block.

    q_sizes, k_sizes: (N, P) tokens of each part, 0 for those that count for nothing; None for one part a block
    In float32: (B, heads, N, N), each row summing to one. Of one part a block it is the attention between means itself.
    """
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if q_sizes is None or k_sizes is None:
        return scores.softmax(dim=-1)
    scores = scores.masked_fill(k_sizes.flatten() == 0, -math.inf)
    by_key_block = scores.softmax(dim=-1).unflatten(-1, k_sizes.shape).sum(dim=-1)
    there = (q_sizes > 0).to(q.dtype)
    rows = by_key_block.unflatten(2, q_sizes.shape) * there[..., None]
    return rows.sum(dim=3) / there.sum(dim=1)[:, None]


def top_p_mask(probability: Tensor, cut: Tensor, least: Tensor | None = None, most: Tensor | None = None) -> Tensor:
    """Smallest set of blocks a row whose probability reaches 1 - cut; bool, the shape of `probability`.

    least, most: how many blocks a row keeps at least and at most, whatever their probability; None for no limit
    Blocks are dropped from the least probable up, the lower-numbered first where two are equal, while the running
    sum stays below `cut`. A row's most probable block always stays.
    """
    ascending, order = probability.sort(dim=-1, stable=True)
    # From the least probable up, as the published program sums; the sum from the other end rounds otherwise.
    kept = ascending.cumsum(dim=-1) >= cut
    if least is not None:
        kept = kept | _last(kept, least)
    if most is not None:
        kept = kept & _last(kept, most)
    return _unsort(kept, order)


def top_k_mask(probability: Tensor, count: Tensor) -> Tensor:
    """The `count` most probable blocks of every row, the higher-numbered first where two are equal; bool."""
    order = probability.sort(dim=-1, stable=True).indices
    return _unsort(_last(order, count).expand_as(order), order)


def _last(row: Tensor, count: Tensor) -> Tensor:
    """Which are the last `count` places of a row."""
    rank = torch.arange(row.shape[-1], device=row.device)
    return rank >= row.shape[-1] - count


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
    least, most: 0-d int64, limits of what is kept by the threshold in every row, or None
    window: (1, 1, N, N) bool, blocks kept besides, or None
    half: whether q and k are of half precision, so that products of means of their parts may be too
    """

    layout: TileLayout
    cut: Tensor | None
    count: Tensor | None
    window: Tensor | None
    least: Tensor | None = None
    most: Tensor | None = None
    half: bool = False

    @classmethod
    def build(
        cls,
        grid: tuple[int, int, int],
        config: NablaConfig,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
    ) -> Selection:
        """For a grid of (frames, rows, columns) tokens. The config must not be dense.

        dtype: of q and k; where it is not known, means of them are taken as if they were of float32
        Raises `InputError` for a config with a profile, which is of many layers.
        """
        if config.profile is not None:
            raise InputError(f"{config.algorithm} is of many layers and steps; take what one runs from NablaConfig.at")
        layout = TileLayout.build(grid, config.tile, device, config.pool)
        cut = window = None
        if config.threshold is not None:
            # Subtracted in float64, and rounded once.
            cut = torch.tensor(1 - config.threshold, dtype=torch.float32, device=device)
        shares = config.keep, config.keep_min, config.keep_max
        count, least, most = (
            None if share is None else torch.tensor(blocks_to_keep(share, layout.blocks), device=device)
            for share in shares
        )
        if config.window is not None:
            window = window_mask(layout.tiles, config.window, device)[None, None]
        return cls(layout, cut, count, window, least, most, dtype in (torch.bfloat16, torch.float16))

    @property
    def is_fixed(self) -> bool:
        """Whether the window alone decides, whatever q and k."""
        return self.cut is None and self.count is None

    @torch.no_grad()
    def block_mask(self, q: Tensor, k: Tensor) -> Tensor:
        """Which blocks are kept for means q and k (B, heads, N * P, D) float32: (B or 1, heads or 1, N, N) bool."""
        if self.is_fixed:
            assert self.window is not None
            return self.window
        # Autocast would round the map to half precision, and other blocks would be chosen.
        with torch.autocast(q.device.type, enabled=False):
            return self._chosen(q, k)

    def _chosen(self, q: Tensor, k: Tensor) -> Tensor:
        layout = self.layout
        sizes = None if layout.parts == 1 else layout.part_sizes
        entries = q.shape[0] * q.shape[2] ** 2
        heads = max(1, MAP_ENTRIES // entries)
        # Of small parts one head's map may be too large too.
        blocks = max(1, layout.blocks * MAP_ENTRIES // (entries * heads))
        groups = []
        for q_group, k_group in zip(q.split(heads, dim=1), k.split(heads, dim=1)):
            rows = []
            for start in range(0, layout.blocks, blocks):
                of = slice(start, start + blocks)
                q_rows = q_group[:, :, start * layout.parts : (start + blocks) * layout.parts]
                rows.append(self._by_rule(block_map(q_rows, k_group, None if sizes is None else sizes[of], sizes)))
            groups.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=2))
        block_mask = torch.cat(groups, dim=1)
        return block_mask if self.window is None else block_mask | self.window

    def _by_rule(self, probability: Tensor) -> Tensor:
        """The mask by threshold or count of a block map (B, heads, N, N)."""
        if self.count is not None:
            return top_k_mask(probability, self.count)
        assert self.cut is not None
        return top_p_mask(probability, self.cut, self.least, self.most)


def blocks_to_keep(density: float, blocks: int) -> int:
    """The least number of blocks that is at least `density` of them; a density exact up to rounding is exact."""
    return max(1, math.ceil(density * blocks - 1e-9))
