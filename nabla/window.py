"""The sliding-tile window as a block mask (Sliding Tile Attention, arXiv 2502.04507)."""

from __future__ import annotations

import torch
from torch import Tensor


def window_mask(tiles: tuple[int, int, int], window: tuple[int, int, int], device: torch.device | str) -> Tensor:
    """Which key blocks lie in each query block's window, (N, N) bool.

    tiles: tiles along (frames, rows, columns), N in all; window: its extent in blocks on the same axes. A block is
    kept where it is at most half the extent away on every axis, so near an edge the window is cut, not moved.
    """
    near = []
    for count, extent in zip(tiles, window):
        position = torch.arange(count, device=device)
        near.append((position[:, None] - position[None, :]).abs() <= min(extent, 2 * count) // 2)
    t, h, w = near
    # (frames, rows, columns) of query blocks, then of key blocks.
    both = t[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    blocks = len(t) * len(h) * len(w)
    return both.reshape(blocks, blocks)
