"""Plain masked attention: obviously right, on any device, differentiable, in bounded memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nabla import probe
from nabla.dropped import TileMeans, wide
from nabla.selection import Selection
from nabla.tiling import TileLayout

DTYPES: tuple[torch.dtype, ...] | None = None
HEAD_SIZES: tuple[int, ...] | None = None
# Token pairs masked and scored at once; bounds memory to a few hundred MiB whatever the length.
TOKEN_PAIRS = 2**26


class Blocks(NamedTuple):
    """A block mask (B or 1, heads or 1, N, N) bool, and which slots hold a token, (N * block,) bool."""

    mask: Tensor
    valid: Tensor


def unsupported_reason(
    device: torch.device, block: int, dtype: torch.dtype | None = None, head_size: int | None = None
) -> str:
    """Why this backend cannot run blocks of `block` tokens on a device, or ""."""
    return ""


def backward_unsupported_reason(
    device: torch.device, dtype: torch.dtype | None = None, head_size: int | None = None
) -> str:
    """Why this backend has no gradients on a device, of q, k and v of a dtype and head size, or ""."""
    return ""


def prepare(block_mask: Tensor, layout: TileLayout) -> Blocks:
    """A block mask (B or 1, heads or 1, N, N) bool -> what `attend` needs of it."""
    return Blocks(block_mask, layout.valid.flatten())


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
    probe.see(lambda: block_counts(blocks), lambda chosen: blocks.mask[:, chosen])
    batch, heads, length, _ = q.shape
    block_mask = blocks.mask.expand(batch, heads, -1, -1)
    block = length // block_mask.shape[-1]
    # Heads are taken together while all their rows fit, else one head's rows in groups.
    head_group = max(1, TOKEN_PAIRS // (batch * length**2))
    row_group = max(1, TOKEN_PAIRS // (batch * head_group * block * length))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))

    def rows(head: int, row: int) -> Tensor:
        h, r = slice(head, head + head_group), slice(row * block, (row + row_group) * block)
        of_heads = None if means is None else TileMeans(means.k[:, h], means.v[:, h], means.sizes)
        args = q[:, h, r], k[:, h], v[:, h], block_mask[:, h, row : row + row_group], blocks.valid, of_heads
        # The mask of a group, a byte a token pair, is made anew in the backward rather than kept until then.
        return checkpoint(_masked_attention, *args, use_reentrant=False) if needs_grad else _masked_attention(*args)

    by_head = []
    for head in range(0, heads, head_group):
        by_head.append(torch.cat([rows(head, row) for row in range(0, block_mask.shape[-1], row_group)], dim=2))
    return torch.cat(by_head, dim=1)


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor, valid: Tensor, means: TileMeans | None
) -> Tensor:
    """q (B, heads, rows * block, D), k and v (B, heads, N * block, D), block_mask (B, heads, rows, N) -> q's shape."""
    block = k.shape[2] // block_mask.shape[-1]
    by_query = block_mask.repeat_interleave(block, dim=-2)
    # No row is masked whole, which would be NaN: each keeps a block, and each block has a valid token.
    mask = by_query.repeat_interleave(block, dim=-1) & valid
    if means is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # A mean that stands for so many tokens is a key so many times, which adds the logarithm to its score.
    exact = wide(q.dtype)
    bias = torch.where(torch.cat((mask, ~by_query), dim=-1), 0.0, -math.inf).to(exact)
    bias[..., k.shape[2] :] += means.sizes.to(exact).log()
    k, v = (torch.cat((x.to(exact), mean.to(exact)), dim=2) for x, mean in ((k, means.k), (v, means.v)))
    return F.scaled_dot_product_attention(q.to(exact), k, v, attn_mask=bias).to(q.dtype)
