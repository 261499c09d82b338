"""Boolean block masks as the int32 lists that sparse kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The positions below are int64, 8 bytes an entry; heads are taken in groups of at most this many entries.
LIST_ENTRIES = 2**27


class BlockLists(NamedTuple):
    """For every query block, how many key blocks and which: (..., N) and (..., N, N) int32, ascending.

    What stands after a list's end means nothing. Only the first entry of an empty list is a block's number too.
    """

    counts: Tensor
    indices: Tensor


def to_lists(block_mask: Tensor) -> BlockLists:
    """(B, heads, N, N) bool -> `BlockLists` of the True entries of every row."""
    heads = max(1, LIST_ENTRIES // (block_mask.shape[0] * block_mask.shape[-1] ** 2))
    indices = torch.cat([_indices(group) for group in block_mask.split(heads, dim=1)], dim=1)
    return BlockLists(block_mask.sum(dim=-1, dtype=torch.int32), indices)


def from_lists(*lists: BlockLists) -> Tensor:
    """The mask of the blocks in one or more `BlockLists`, (..., N, N) bool: the inverse of `to_lists`."""
    counts, indices = lists[0]
    width = indices.shape[-1]
    rank = torch.arange(width, dtype=torch.int32, device=counts.device)
    block_mask = torch.zeros(*indices.shape[:-1], width + 1, dtype=torch.bool, device=counts.device)
    for counts, indices in lists:
        # What stands after a list's end goes to a last column that is cut off.
        number = torch.where(rank < counts[..., None], indices, width).long()
        block_mask = block_mask.scatter(-1, number, True)
    return block_mask[..., :-1]


def _indices(block_mask: Tensor) -> Tensor:
    width = block_mask.shape[-1]
    # Each kept block moves to its rank among the kept ones of its row; the rest go to a last column that is cut off.
    position = torch.where(block_mask, block_mask.cumsum(dim=-1) - 1, width)
    numbers = torch.arange(width, dtype=torch.int32, device=block_mask.device).expand(block_mask.shape)
    lists = torch.zeros(*block_mask.shape[:-1], width + 1, dtype=torch.int32, device=block_mask.device)
    return lists.scatter(-1, position, numbers)[..., :-1].contiguous()
