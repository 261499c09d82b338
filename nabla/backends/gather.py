"""Block-sparse attention on a CPU: of every query block, dense attention to a copy of the key blocks that it keeps.

The copies are few at a time, so that they stay in the cache, where making them costs little beside the products.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla import probe
from nabla.dropped import TileMeans, wide
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


def dropped_unsupported_reason(device: torch.device) -> str:
    """Why this backend cannot have means stand for dropped blocks on a device, or ""."""
    return ""


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, means: TileMeans | None = None) -> Tensor:
    """Attention of q, k, v (B, heads, N * block, D) in tile order over the kept blocks; same shape and dtype.

    means: what stands for the others, None for nothing
    """
    return block_sparse(q, k, v, *blocks, *(means or (None, None, None)))


# An operator, since how much is copied depends on the blocks, of which no compiler can make one graph.
@torch.library.custom_op("nabla::gather", mutates_args=())
def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    valid: Optional[Tensor],
    k_means: Optional[Tensor],
    v_means: Optional[Tensor],
    sizes: Optional[Tensor],
) -> Tensor:
    probe.see(lambda: block_mask.sum(dim=-1), lambda heads: block_mask[:, heads])
    means = None
    if k_means is not None and v_means is not None and sizes is not None:
        means = TileMeans(k_means, v_means, sizes)
    return probe.run(probe.ATTENTION, _attend, q, k, v, block_mask, valid, means)


@block_sparse.register_fake
def _(q: Tensor, *_) -> Tensor:
    return q.new_empty(q.shape)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor, valid: Tensor | None, means: TileMeans | None
) -> Tensor:
    blocks = block_mask.shape[-1]
    block_mask = block_mask.expand(*q.shape[:2], -1, -1).reshape(-1, blocks)
    k_means, v_means, sizes = means or (None, None, None)
    # By block, of all heads one after the other: (B * heads * N, block, D).
    q_blocks, k_blocks, v_blocks = (_by_block(x, blocks, of) for x, of in ((q, None), (k, k_means), (v, v_means)))
    counts, of_a_head = block_mask.sum(dim=-1), len(k_blocks) // (len(q_blocks) // blocks)
    more = of_a_head - blocks
    out = torch.empty_like(q_blocks)
    threads, most = torch.get_num_threads(), KEY_NUMBERS // k_blocks[0].numel()
    # Memory that is asked for anew each time comes page by page, which takes as long as to fill it.
    # What the largest round below copies, in blocks.
    copied = min(int((counts + more).sum()), max(threads * (int(counts.max()) + more), most))
    held = [x.new_empty(copied, *x.shape[1:]) for x in (k_blocks, v_blocks)]
    # None is 0: a row keeps its most probable block or, by a window, its own.
    for count in counts.unique().tolist():
        # One query block a thread, or more if they are small, of those that keep equally many, so that none is padded.
        at_once = max(threads, most // (count + more))
        for rows in (counts == count).nonzero().squeeze(1).split(at_once):
            kept = block_mask.index_select(0, rows)
            keys = kept.nonzero()[:, 1].view(-1, count)
            mask = _mask(kept, keys, q_blocks, valid, sizes)
            # Numbers of blocks are within a head, and here through all heads.
            numbers = F.pad(keys, (0, more))
            numbers[:, count:] = torch.arange(blocks, of_a_head)
            numbers += (rows // blocks * of_a_head)[:, None]
            # (1, rows, keys, D) each: query blocks stand in the place of heads.
            k_copy, v_copy = (
                torch.index_select(x, 0, numbers.flatten(), out=to[: numbers.numel()]).view(
                    1, len(rows), -1, x.shape[-1]
                )
                for x, to in zip((k_blocks, v_blocks), held)
            )
            queries = q_blocks.index_select(0, rows)[None]
            out.index_copy_(0, rows, F.scaled_dot_product_attention(queries, k_copy, v_copy, attn_mask=mask)[0])
    return out.view(q.shape)


def _by_block(x: Tensor, blocks: int, means: Tensor | None) -> Tensor:
    """(B, heads, N * block, D) -> (B * heads * N, block, D); behind a head's blocks its means, as if of more blocks."""
    x = x.unflatten(2, (blocks, -1))
    if means is None:
        return x.flatten(0, 2)
    block = x.shape[3]
    means = F.pad(means.to(x.dtype), (0, 0, 0, -blocks % block)).unflatten(2, (-1, block))
    return torch.cat((x, means), dim=2).flatten(0, 2)


def _mask(kept: Tensor, keys: Tensor, q_blocks: Tensor, valid: Tensor | None, sizes: Tensor | None) -> Tensor | None:
    """What to mask or add in scores of some query blocks, whose kept blocks are `keys`: (1, rows, 1, keys), or None."""
    mask = None if valid is None else valid[keys].flatten(1)
    if sizes is not None:
        block = q_blocks.shape[1]
        tokens = kept.new_ones(len(keys), keys.shape[1] * block) if mask is None else mask
        means = F.pad(~kept, (0, -kept.shape[1] % block))
        mask = torch.where(torch.cat((tokens, means), dim=1), 0.0, -math.inf).to(wide(q_blocks.dtype))
        # A mean that stands for so many tokens is a key so many times, which adds the logarithm to its score.
        mask[:, tokens.shape[1] :][:, : len(sizes)] += sizes.to(mask.dtype).log()
    return None if mask is None else mask[None, :, None]
