"""How a VAE decodes: in which type, and in how many columns of a picture, so that it fits beside what a GPU holds."""

from __future__ import annotations

import logging

import torch

from wan.memory.estimates import GIB, MOST_TILES, Decoding, decode_bytes
from wan.memory.placement import free_bytes

log = logging.getLogger("wan")


def vae_dtype_of(given: torch.dtype | None, dtype: torch.dtype, device: str = "cuda") -> torch.dtype:
    """The decoder's type on a kind of device, beside a transformer of `dtype`."""
    return given or (torch.float32 if dtype == torch.float32 or device == "cpu" else torch.float16)


def tiles_for(decoding: Decoding, device: torch.device, doing: str = "decoding") -> int:
    """In how few columns a GPU's free memory lets a video be decoded; says so if several. 1 on other devices.

    doing: what it says that is, where a video is encoded instead
    """
    if device.type != "cuda":
        return 1
    free, needs = free_bytes(device), [decode_bytes(decoding, n + 1) for n in range(MOST_TILES)]
    tiles = next((n + 1 for n, need in enumerate(needs) if need <= free), MOST_TILES)
    if tiles > 1:
        log.info("%s in %d tiles: at once needs %.1f GiB, %.1f are free", doing, tiles, needs[0] / GIB, free / GIB)
    return tiles
