"""What a backend offers. A backend is a module, and `Backend` is its type."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from nabla.dropped import TileMeans
from nabla.selection import Selection
from nabla.tiling import TileLayout

# The blocks to attend to as one backend takes them, of a type of its own.
Prepared: TypeAlias = Any


class Backend(Protocol):
    """An attention kernel: how it is given blocks, and what it cannot do.

    B: batch, N: blocks, D: head size. What is the same for all of a batch or all heads may have size one there.
    """

    # What q, k and v may be on some device, None for all.
    DTYPES: tuple[torch.dtype, ...] | None
    HEAD_SIZES: tuple[int, ...] | None

    def unsupported_reason(
        self, device: torch.device, block: int, dtype: torch.dtype | None = None, head_size: int | None = None
    ) -> str:
        """Why this backend cannot run blocks of `block` tokens on a device, or "".

        dtype, head_size: of q, k and v (None: not known), of which a device may take less than `DTYPES` and
        `HEAD_SIZES` say
        """

    def backward_unsupported_reason(
        self, device: torch.device, dtype: torch.dtype | None = None, head_size: int | None = None
    ) -> str:
        """Why this backend has no gradients on a device, of q, k and v of a dtype and head size, or ""."""

    def dropped_unsupported_reason(self, device: torch.device) -> str:
        """Why this backend cannot have means stand for dropped blocks on a device, or ""."""

    def prepare(self, block_mask: Tensor, layout: TileLayout) -> Prepared:
        """A block mask (B or 1, heads or 1, N, N) bool -> what `attend` needs of it."""

    def choose(self, q: Tensor, k: Tensor, selection: Selection) -> Prepared:
        """The blocks that block means q and k (B, heads, N, D) float32 choose, prepared."""

    def block_counts(self, blocks: Prepared) -> Tensor:
        """How many key blocks each query block keeps: (B or 1, heads or 1, N)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: Prepared, means: TileMeans | None = None) -> Tensor:
        """Attention of q, k, v (B, heads, N * block, D) in tile order over the kept blocks; same shape and dtype.

        means: of the keys and values of all tiles; a query attends to those of the tiles that it drops too, each
            counted as often as its tile has tokens. None to attend to kept blocks alone
        Where means are given gradients are those of `reference` alone.
        """
