"""Where models lie, and estimates of GPU memory, for choices that are made before it runs out: on the large side."""

from __future__ import annotations

import logging
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wan.config import VAE_STRIDE
from wan.parallel import is_sharded

log = logging.getLogger("wan")

GIB = 2**30
# Measured on the published VAE, 81 frames: 20.7 GiB for 1280x720 in float32.
DECODE_BYTES_PER_PIXEL = 24_000
# Part of a GPU that weights may fill when a 720p forward still has to fit beside them.
WEIGHT_SHARE = 0.6
# Float32 and working-precision copies of the hidden states that a block holds at once, besides its feed-forward.
HIDDEN_COPIES = 6


@contextmanager
def placed(module: nn.Module, device: torch.device, offload: bool) -> Iterator[nn.Module]:
    """A model on the device it runs on, and back in host memory afterwards if idle ones are offloaded.

    One whose weights are sharded stays where it is.
    """
    if not offload or is_sharded(module):
        yield module
        return
    try:
        yield module.to(device)
    finally:
        module.to("cpu")


def peak_host_bytes() -> int:
    """The most host memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still get on a CUDA device, its own unused cache included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def is_crowded(device: torch.device, weights: int) -> bool:
    """Whether so many bytes of weights leave a GPU too little room to work in, so that idle parts should move out."""
    if device.type != "cuda":
        return False
    return weights > WEIGHT_SHARE * torch.cuda.get_device_properties(device).total_memory


def has_room_for_both(transformer: nn.Module, latents: Tensor) -> bool:
    """Whether both guidance branches are so small beside the GPU that one batch of two fills it better."""
    if latents.device.type != "cuda":
        return False
    config = transformer.config
    tokens = 2 * latents[:, 0].numel() // math.prod(config.patch_size)
    width = config.num_attention_heads * config.attention_head_dim
    need = working_bytes(tokens, width, config.ffn_dim, transformer.dtype.itemsize)
    return need < free_bytes(latents.device) // 8


def working_bytes(tokens: int, width: int, ffn_dim: int, itemsize: int) -> int:
    """What a forward of so many tokens needs beside the weights."""
    return tokens * (width * HIDDEN_COPIES * 4 + ffn_dim * 2 * itemsize)


def needs_tiling(latents: Tensor) -> bool:
    """Whether a GPU has too little memory left to decode latents (B, C, T, h, w) at once; says so if that is so."""
    if latents.device.type != "cuda":
        return False
    pixels = latents[0, 0, 0].numel() * VAE_STRIDE[1] * VAE_STRIDE[2]
    need, free = pixels * DECODE_BYTES_PER_PIXEL * latents.element_size() // 4, free_bytes(latents.device)
    if need > free:
        log.info("decoding in tiles: at once needs %.1f GiB, %.1f are free", need / GIB, free / GIB)
    return need > free
