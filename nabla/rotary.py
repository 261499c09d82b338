"""Rotary position embedding (RoFormer, arXiv 2104.09864), of pairs of neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Cosines and sines of each token's angles, (1, S, 1, D) each, every angle given twice in a row."""

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """x (B, S, heads, D) with each pair of neighbours turned by its angle; same dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    # Every angle stands there twice. Cosines may be in float32, so the result is rounded back.
    cos, sin = rotary.cos[..., ::2], rotary.sin[..., ::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
