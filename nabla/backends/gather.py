"""Block-sparse attention on a CPU: of every query block, dense attention to a copy of the key blocks that it keeps.

The copies are few at a time, so that they stay in the cache, where making them costs little beside the products.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla import probe
from nabla.selection import Selection
from nabla.tiling import TileLayout

DTYPES: tuple[torch.dtype, ...] | None = None
HEAD_SIZES: tuple[int, ...] | None = None
# Query blocks that keep few are taken together, up to so many numbers of their keys, for a call costs as much as they.
KEY_NUMBERS = 2**18


class Blocks(NamedTuple):
    """A block mask (B or 1, heads or 1, N, N) bool, and which slots hold a token, (N, block) bool; None: all do."""

    mask: Tensor
    valid: Tensor | None


def unsupported_reason(
    device: torch.device, block: int, dtype: torch.dtype | None = None, head_size: int | None = None
) -> str:
    """Why this backend cannot run blocks of `block` tokens on a device, or ""."""
    return "" if device.type == "cpu" else "is for CPUs alone"


def backward_unsupported_reason(
    device: torch.device, dtype: torch.dtype | None = None, head_size: int | None = None
) -> str:
    """Why this backend has no gradients on a device, of q, k and v of a dtype and head size, or ""."""
    # They would hold every copy, whose memory grows with the square of the length; `reference` makes its masks anew.
    return "has no backward"


def prepare(block_mask: Tensor, layout: TileLayout) -> Blocks:
    """A block mask (B or 1, heads or 1, N, N) bool -> what `attend` needs of it."""
    return Blocks(block_mask, layout.valid if layout.has_partial_tiles else None)


def choose(q: Tensor, k: Tensor, selection: Selection) -> Blocks:
    """The blocks that block means q and k (B, heads, N, D) choose, prepared."""
    return prepare(selection.block_mask(q, k), selection.layout)


def block_counts(blocks: Blocks) -> Tensor:
    """How many key blocks each query block keeps: (B or 1, heads or 1, N)."""
    return blocks.mask.sum(dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """Attention of q, k, v (B, heads, N * block, D) in tile order over the kept blocks; same shape and dtype."""
    return block_sparse(q, k, v, *blocks)


# An operator, since how much is copied depends on the blocks, of which no compiler can make one graph.
@torch.library.custom_op("nabla::gather", mutates_args=())
def block_sparse(q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor, valid: Optional[Tensor]) -> Tensor:
    probe.see(lambda: block_mask.sum(dim=-1), lambda heads: block_mask[:, heads])
    return probe.run(probe.ATTENTION, _attend, q, k, v, block_mask, valid)


@block_sparse.register_fake
def _(q: Tensor, *_) -> Tensor:
    return q.new_empty(q.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor, valid: Tensor | None) -> Tensor:
    blocks = block_mask.shape[-1]
    # By block, of all heads one after the other: (B * heads * N, block, D).
    q_blocks, k_blocks, v_blocks = (x.reshape(-1, x.shape[2] // blocks, x.shape[3]) for x in (q, k, v))
    block_mask = block_mask.expand(*q.shape[:2], -1, -1).reshape(-1, blocks)
    out = torch.empty_like(q_blocks)
    counts = block_mask.sum(dim=-1)
    threads, most = torch.get_num_threads(), KEY_NUMBERS // k_blocks[0].numel()
    # Memory that is asked for anew each time comes page by page, which takes as long as to fill it.
    # What the largest round below copies, in blocks.
    copied = min(int(counts.sum()), max(threads * int(counts.max()), most))
    held = [x.new_empty(copied, *x.shape[1:]) for x in (k_blocks, v_blocks)]
    # None is 0: a row keeps its most probable block or, by a window, its own.
    for count in counts.unique().tolist():
        # One query block a thread, or more if they are small, of those that keep equally many, so that none is padded.
        at_once = max(threads, most // count)
        for rows in (counts == count).nonzero().squeeze(1).split(at_once):
            keys = block_mask.index_select(0, rows).nonzero()[:, 1].view(-1, count)
            # (1, rows, 1, count * block): query blocks stand in the place of heads.
            mask = None if valid is None else valid[keys].flatten(1)[None, :, None]
            # Keys are numbered within a head, blocks of k and v through all heads.
            numbers = (keys + (rows - rows % blocks)[:, None]).flatten()
            # (1, rows, count * block, D) each
            k_copy, v_copy = (
                torch.index_select(x, 0, numbers, out=to[: len(numbers)]).view(1, len(rows), -1, x.shape[-1])
                for x, to in zip((k_blocks, v_blocks), held)
            )
            queries = q_blocks.index_select(0, rows)[None]
            out.index_copy_(0, rows, F.scaled_dot_product_attention(queries, k_copy, v_copy, attn_mask=mask)[0])
    return out.view(q.shape)
