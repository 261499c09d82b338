"""Blocks chosen on a GPU, as `nabla.selection` chooses them: the map of some heads, then lists of each of its rows."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from nabla import probe
from nabla.block_lists import BlockLists
from nabla.kernels.block_lists import MAX_BLOCKS, empty_lists, lists_of_blocks, parts_of
from nabla.kernels.block_map import block_scores
from nabla.kernels.gpu import can_run
from nabla.kernels.part_map import MAX_PARTS, part_map
from nabla.kernels.row_selection import Rule, lists_of_map
from nabla.selection import MAP_ENTRIES, Selection


def applies(means: Tensor, selection: Selection) -> bool:
    """Whether this path can do a selection for means of parts (B, heads, N * P, D)."""
    layout = selection.layout
    return can_run(means) and layout.blocks <= MAX_BLOCKS and layout.parts <= MAX_PARTS and not selection.is_fixed


def choose_lists(q: Tensor, k: Tensor, selection: Selection, split: bool = False) -> list[BlockLists]:
    """Lists of the blocks that `selection.block_mask` keeps for means q and k (B, heads, N * P, D) float32.

    split: two lists, of full key tiles and of partial ones
    Here sums are float32 in another order than there, so where two blocks are equal within rounding, or the running
    sum meets the threshold within it, the other block may be kept.
    """
    layout = selection.layout
    full = layout.full if split else None
    if not applies(q, selection):
        return lists_of_blocks(selection.block_mask(q, k), full)
    rule = Rule(full, selection.cut, selection.count, selection.least, selection.most, selection.window)
    part_sizes = None if layout.parts == 1 else layout.part_sizes
    return parts_of(_select_lists(q, k, *rule, part_sizes, layout.has_empty_parts, selection.half))


@torch.library.custom_op("nabla::select_lists", mutates_args=())
def _select_lists(
    q: Tensor,
    k: Tensor,
    full: Optional[Tensor],
    cut: Optional[Tensor],
    count: Optional[Tensor],
    least: Optional[Tensor],
    most: Optional[Tensor],
    window: Optional[Tensor],
    part_sizes: Optional[Tensor],
    has_empty_parts: bool,
    half: bool,
) -> tuple[Tensor, Tensor]:
    """Counts (1 or 2, B, heads, N) and indices (1 or 2, B, heads, N, N), int32, of full tiles and of partial ones."""
    lists = _empty(q, full, part_sizes)
    rule = Rule(full, cut, count, least, most, window)
    probe.run(probe.MASK, _write_lists, q, k, part_sizes, has_empty_parts, half, rule, *lists)
    return lists


@_select_lists.register_fake
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    full, *_, part_sizes, _, _ = rest
    return _empty(q, full, part_sizes)


def _empty(q: Tensor, full: Tensor | None, part_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    parts = 1 if part_sizes is None else part_sizes.shape[1]
    return empty_lists(q[:, :, ::parts], full)


def _write_lists(
    q: Tensor,
    k: Tensor,
    part_sizes: Tensor | None,
    has_empty_parts: bool,
    half: bool,
    rule: Rule,
    counts: Tensor,
    indices: Tensor,
) -> None:
    batch, heads, blocks = counts.shape[1:]
    # A map is 4 bytes an entry; all heads of a long video at once would be gigabytes.
    group = max(1, MAP_ENTRIES // (batch * blocks**2))
    with torch.cuda.device(q.device):
        for start in range(0, heads, group):
            of = slice(start, start + group)
            if part_sizes is None:
                block_map = block_scores(q[:, of], k[:, of])
            else:
                block_map = part_map(q[:, of], k[:, of], part_sizes, has_empty_parts, half)
            lists_of_map(block_map, rule, counts[:, :, of], indices[:, :, of], is_probability=part_sizes is not None)
