"""What sparse attention costs in quality: likeness to the dense video, and the attention that its blocks hold."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import nabla
from nabla import NablaConfig
from nabla.rotary import Rotary, rotate
from nabla.tiling import TileLayout

# Of SSIM (Wang et al. 2004, "Image quality assessment"): the window's width and standard deviation, and what keeps a
# division by next to nothing stable.
WINDOW, STD = 11, 1.5
STABLE_MEAN, STABLE_STD = 0.01**2, 0.03**2
# Token pairs scored at once.
PAIRS = 2**27

# For each layer, a pair of `density_and_mass` for each forward.
Masses = dict[int, list[tuple[Tensor, Tensor]]]


def psnr(video: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 videos of one shape; infinity if they are equal."""
    error = (video.double() - other.double()).square().mean().item() / 255**2
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(video: Tensor, other: Tensor) -> float:
    """Structural similarity of two uint8 videos (frames, H, W, 3), mean over pixels, colours and frames; 1 if equal."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=video.device) - WINDOW // 2
    row = torch.exp(-(offsets**2) / (2 * STD**2))
    row = (row / row.sum())[None, None, None]

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, row), row.mT)

    x, y = (one.permute(0, 3, 1, 2).flatten(0, 1)[:, None].double() / 255 for one in (video, other))
    mean_x, mean_y = mean(x), mean(y)
    # By E[x^2] - E[x]^2 within the window: in float64, since it is a small difference of large numbers.
    variance_x, variance_y = mean(x**2) - mean_x**2, mean(y**2) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    means = (2 * mean_x * mean_y + STABLE_MEAN) / (mean_x**2 + mean_y**2 + STABLE_MEAN)
    structures = (2 * covariance + STABLE_STD) / (variance_x + variance_y + STABLE_STD)
    return (means * structures).mean().item()


@torch.no_grad()
def density_and_mass(q: Tensor, k: Tensor, grid: tuple[int, int, int], config: NablaConfig) -> tuple[Tensor, Tensor]:
    """The share of blocks that each head keeps, and of true attention that these hold: (heads,) float32 each.

    q, k: (B, S, heads, D) in raster order, turned by their angles already; the means over all queries and the batch
    """
    kept = nabla.select_blocks(q, k, grid, config)
    layout = TileLayout.build(grid, config.tile, q.device)
    q, k = (layout.to_tiles(x).float() for x in (q, k))
    blocks, valid = layout.blocks, layout.valid.flatten()
    # Rows of blocks, so that their scores (B, heads, rows x block, N x block) are about PAIRS numbers.
    rows = max(1, PAIRS // (q.shape[0] * q.shape[1] * layout.block * k.shape[2]))
    mass = q.new_zeros(q.shape[1])
    for first in range(0, blocks, rows):
        tokens = slice(first * layout.block, (first + rows) * layout.block)
        scores = q[:, :, tokens] @ k.mT / math.sqrt(q.shape[-1])
        # Each query's attention by blocks of keys: (B, heads, tokens, N).
        shares = scores.masked_fill(~valid, -math.inf).softmax(-1).unflatten(-1, (blocks, -1)).sum(-1)
        # A row of the mask holds for all tokens of its block.
        held = kept[:, :, first : first + rows].repeat_interleave(layout.block, dim=2)
        # Queries that are padding do not count.
        mass += ((shares * held).sum(-1) * valid[tokens]).sum((0, 2))
    return kept.float().mean((0, 2, 3)), mass / (len(q) * math.prod(grid))


@contextmanager
def measure_mass(transformer: WanTransformer3DModel, config: NablaConfig) -> Iterator[Masses]:
    """Measure, in every forward within, what `density_and_mass` says of each layer.

    The transformer's blocks must not be compiled; what it attends by is not changed.
    """
    found: Masses = defaultdict(list)
    patch, grid = transformer.config.patch_size, []

    def see_grid(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # (B, C, T, h, w): the grid of tokens is that of latents over the patch.
        latents = args[0] if args else kwargs["hidden_states"]
        grid[:] = (n // p for n, p in zip(latents.shape[2:], patch))

    def measure(layer: int, attention: nn.Module, args: tuple) -> None:
        # As diffusers' block calls its self-attention: hidden states, no encoder states, no mask, rotary embedding.
        hidden, _, _, rotary = args
        q, k = (
            rotate(norm(linear(hidden)).unflatten(2, (attention.heads, -1)), Rotary(*rotary))
            for norm, linear in ((attention.norm_q, attention.to_q), (attention.norm_k, attention.to_k))
        )
        found[layer].append(density_and_mass(q, k, tuple(grid), config))

    hooks = [transformer.register_forward_pre_hook(see_grid, with_kwargs=True)]
    for layer, block in enumerate(transformer.blocks):
        hooks.append(block.attn1.register_forward_pre_hook(partial(measure, layer)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
