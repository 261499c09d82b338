"""Estimates of GPU memory, for choices that are made before it runs out. They err on the large side."""

from __future__ import annotations

import torch

GIB = 2**30
# Measured on the published VAE, 81 frames: 20.7 GiB for 1280x720 in float32.
DECODE_BYTES_PER_PIXEL = 24_000
# Part of a GPU that weights may fill when a 720p forward still has to fit beside them.
WEIGHT_SHARE = 0.6
# Float32 and working-precision copies of the hidden states that a block holds at once, besides its feed-forward.
HIDDEN_COPIES = 6


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still get on a CUDA device, its own unused cache included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def is_crowded(device: torch.device, weights: int) -> bool:
    """Whether so many bytes of weights leave a GPU too little room to work in, so that idle parts should move out."""
    if device.type != "cuda":
        return False
    return weights > WEIGHT_SHARE * torch.cuda.get_device_properties(device).total_memory


def forward_bytes(tokens: int, dim: int, ffn_dim: int, itemsize: int) -> int:
    """Activations of one transformer forward at batch 1."""
    return tokens * (dim * HIDDEN_COPIES * 4 + ffn_dim * 2 * itemsize)


def decode_bytes(height: int, width: int, itemsize: int) -> int:
    """Working memory of decoding a video of height x width pixels without tiling."""
    return height * width * DECODE_BYTES_PER_PIXEL * itemsize // 4
