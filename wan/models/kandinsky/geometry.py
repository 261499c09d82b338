"""How Kandinsky-5 cuts pixels into latents and tokens, and how far apart its rotary embedding puts these."""

from __future__ import annotations

from wan.config.geometry import Geometry

GEOMETRY = Geometry(vae_stride=(4, 8, 8), patch=(1, 2, 2))
# Sizes up to this side, or of no more pixels than this, are made like those of the training at 512x768, others like
# those at 1024x1024.
LARGEST_SD_SIDE, LARGEST_SD_AREA = 854, 854 * 512
SD_SCALE, HD_SCALE = (1.0, 2.0, 2.0), (1.0, 3.16, 3.16)


def is_sd(size: tuple[int, int]) -> bool:
    """Whether pictures of (width, height) pixels are of the smaller of the two published resolutions."""
    return max(size) <= LARGEST_SD_SIDE or size[0] * size[1] <= LARGEST_SD_AREA


def rope_scale(size: tuple[int, int]) -> tuple[float, float, float]:
    """What the positions of (frames, rows, columns) are divided by, for pictures of (width, height) pixels."""
    return SD_SCALE if is_sd(size) else HD_SCALE
