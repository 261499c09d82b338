"""Plain masked attention: obviously right, on any device, differentiable, in bounded memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nabla import probe
from nabla.selection import Selection
from nabla.tiling import TileLayout

DTYPES = None
HEAD_SIZES = None
# Token pairs masked and scored at once; bounds memory to a few hundred MiB whatever the length.
TOKEN_PAIRS = 2**26


class Blocks(NamedTuple):
    kept: Tensor
    valid: Tensor


def unsupported_reason(device: torch.device, block: int) -> str:
    """Why this backend cannot run blocks of `block` tokens on a device, or ""."""
    return ""


def backward_unsupported_reason(device: torch.device, dtype: torch.dtype | None) -> str:
    """Why this backend has no gradients on a device, of tensors of a dtype (None: not known), or ""."""
    return ""


def prepare(blocks: Tensor, layout: TileLayout) -> Blocks:
    """Kept blocks (B or 1, heads or 1, N, N) bool -> what `attend` needs of them."""
    return Blocks(blocks, layout.valid.flatten())


def choose(q: Tensor, k: Tensor, selection: Selection) -> Blocks:
    """The blocks that block means q and k (B, heads, N, D) choose, prepared."""
    return prepare(selection.blocks(q, k), selection.layout)


def block_counts(blocks: Blocks) -> Tensor:
    """How many key blocks each query block keeps: (B or 1, heads or 1, N)."""
    return blocks.kept.sum(dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """Attention of q, k, v (B, heads, N * block, D) in tile order over the kept blocks; same shape and dtype."""
    probe.see(lambda: block_counts(blocks), lambda chosen: blocks.kept[:, chosen])
    batch, heads, length, _ = q.shape
    kept = blocks.kept.expand(batch, heads, -1, -1)
    block = length // kept.shape[-1]
    head_group = max(1, TOKEN_PAIRS // (batch * length**2))
    row_group = max(1, TOKEN_PAIRS // (batch * head_group * block * length))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))

    def rows(head: int, row: int) -> Tensor:
        h, r = slice(head, head + head_group), slice(row * block, (row + row_group) * block)
        args = q[:, h, r], k[:, h], v[:, h], kept[:, h, row : row + row_group], blocks.valid
        return checkpoint(_masked_attention, *args, use_reentrant=False) if needs_grad else _masked_attention(*args)

    by_head = (
        torch.cat([rows(head, row) for row in range(0, kept.shape[-1], row_group)], dim=2)
        for head in range(0, heads, head_group)
    )
    return torch.cat(list(by_head), dim=1)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, valid: Tensor) -> Tensor:
    block = k.shape[2] // kept.shape[-1]
    mask = kept.repeat_interleave(block, dim=-2).repeat_interleave(block, dim=-1) & valid
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
