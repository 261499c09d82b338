"""Which key blocks each query block keeps, chosen from the content (NABLA, arXiv 2507.13546, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.tiling import TileLayout

# Sorting a map costs 12 bytes an entry beside it; heads are taken in groups of at most this many entries.
MAP_ENTRIES = 2**27


def block_means(x: Tensor, layout: TileLayout) -> Tensor:
    """Mean of each block's valid tokens: (B, heads, N * block, D) in tile order -> (B, heads, N, D) float32."""
    tokens = x.unflatten(2, (layout.blocks, layout.block)).float()
    sums = (tokens * layout.valid[..., None]).sum(dim=3)
    return sums / layout.sizes[:, None]


def block_map(q: Tensor, k: Tensor) -> Tensor:
    """Attention between block means (B, heads, N, D), in float32: (B, heads, N, N), each row summing to one."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1)


def keep_mass(probability: Tensor, cut: Tensor) -> Tensor:
    """Smallest set of blocks a row whose probability reaches 1 - cut; bool, the shape of `probability`.

    Blocks are dropped from the least probable up, the lower-numbered first where two are equal, while the running
    sum stays below `cut`. A row's most probable block always stays.
    """
    ascending, order = probability.sort(dim=-1, stable=True)
    return _unsort(ascending.cumsum(dim=-1) >= cut, order)


def keep_count(probability: Tensor, count: Tensor) -> Tensor:
    """The `count` most probable blocks of every row, the higher-numbered first where two are equal; bool."""
    order = probability.sort(dim=-1, stable=True).indices
    rank = torch.arange(probability.shape[-1], device=probability.device)
    return _unsort((rank >= probability.shape[-1] - count).expand_as(order), order)


def _unsort(kept: Tensor, order: Tensor) -> Tensor:
    """Put back in block order what is kept in ascending order of probability; the last one always is."""
    kept = torch.cat((kept[..., :-1], torch.ones_like(kept[..., -1:])), dim=-1)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def choose_blocks(
    q: Tensor, k: Tensor, layout: TileLayout, cut: Tensor | None, count: Tensor | None, window: Tensor | None
) -> Tensor:
    """Kept blocks, (B, heads, N, N) bool, of q and k (B, heads, N * block, D) in tile order.

    Exactly one of `cut` (0-d float32, one minus the threshold) and `count` (0-d int) is given; `window` is an (N, N)
    bool mask of blocks kept besides.
    """
    q, k = block_means(q, layout), block_means(k, layout)
    heads = max(1, MAP_ENTRIES // (q.shape[0] * layout.blocks**2))
    groups = []
    for q_group, k_group in zip(q.split(heads, dim=1), k.split(heads, dim=1)):
        probability = block_map(q_group, k_group)
        groups.append(keep_mass(probability, cut) if count is None else keep_count(probability, count))
    kept = torch.cat(groups, dim=1)
    return kept if window is None else kept | window
