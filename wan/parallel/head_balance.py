"""Which process attends to which heads, so that none waits long for another."""

from __future__ import annotations

import torch
from torch import Tensor


def split_sizes(count: int, parts: int) -> list[int]:
    """How many of `count` things each of `parts` gets, as evenly as can be, the first ones more."""
    return [count // parts + (part < count % parts) for part in range(parts)]


def interleaved(heads: int, parts: int) -> Tensor:
    """Heads assigned in turn: (heads,), those of the first part first."""
    return torch.cat([torch.arange(part, heads, parts) for part in range(parts)])


def assign_heads(load: Tensor, counts: list[int]) -> Tensor:
    """Heads of each layer by their load (layers, H), assigned to parts of given counts so that all have as much to do.

    The heaviest first, each to the part that has least so far. Returns (layers, H), those of the first part first.
    """
    # All layers at once: in each round every layer assigns one of its heads. `left` and `sums` are (layers, parts).
    layers, left = torch.arange(len(load)), torch.tensor(counts).repeat(len(load), 1)
    sums, parts = torch.zeros(len(load), len(counts)), torch.empty_like(load, dtype=torch.int64)
    # Stable, since every process assigns them by itself.
    for heads in load.argsort(dim=1, descending=True, stable=True).T:
        part = sums.masked_fill(left == 0, float("inf")).argmin(dim=1)
        parts[layers, heads] = part
        sums[layers, part] += load[layers, heads]
        left[layers, part] -= 1
    # parts: (layers, H), the part of each head; sorted by it, heads of one part stay in ascending order.
    return parts.argsort(dim=1, stable=True)
