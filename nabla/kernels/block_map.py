"""The block map before its softmax, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.kernels.gpu import tl, triton

TILE = 128
DEPTH = 64


def block_scores(q: Tensor, k: Tensor) -> Tensor:
    """Scores between block means (B, heads, N, D) float32, scaled, before the softmax: (B, heads, N, N) float32.

    Products are split into three of TF32 (3xTF32, as CUTLASS has it), whose sum has float32's precision at several
    times its speed.
    """
    batch, heads, blocks, dim = q.shape
    scores = torch.empty(batch, heads, blocks, blocks, dtype=torch.float32, device=q.device)
    tiles = triton.cdiv(blocks, TILE)
    _scores_tile[(tiles, tiles, batch * heads)](
        q,
        k,
        scores,
        *q.stride()[:3],
        *k.stride()[:3],
        heads,
        blocks,
        dim**-0.5,
        DIM=dim,
        TILE=TILE,
        DEPTH=DEPTH,
        num_warps=8,
    )
    return scores


if triton is not None:

    @triton.jit
    def _scores_tile(
        q,
        k,
        scores,
        q_batch,
        q_head,
        q_row,
        k_batch,
        k_head,
        k_row,
        heads,
        blocks,
        scale,
        DIM: tl.constexpr,
        TILE: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        """One square tile of the scores of one head of one sample."""
        of = tl.program_id(2)
        batch, head = (of // heads).to(tl.int64), (of % heads).to(tl.int64)
        row = tl.program_id(1) * TILE + tl.arange(0, TILE)
        column = tl.program_id(0) * TILE + tl.arange(0, TILE)
        depth = tl.arange(0, DEPTH)
        q += batch * q_batch + head * q_head
        k += batch * k_batch + head * k_head
        total = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, DIM, DEPTH):
            at = start + depth
            # (TILE, DEPTH) of q and (DEPTH, TILE) of k: k is read transposed. What is outside adds nothing.
            a = tl.load(q + row[:, None] * q_row + at, mask=(row[:, None] < blocks) & (at < DIM), other=0.0)
            b = tl.load(k + column * k_row + at[:, None], mask=(column < blocks) & (at[:, None] < DIM), other=0.0)
            total = tl.dot(a, b, total, input_precision="tf32x3")
        scores += of.to(tl.int64) * blocks * blocks
        inside = (row[:, None] < blocks) & (column < blocks)
        tl.store(scores + row[:, None] * blocks + column, total * scale, mask=inside)
