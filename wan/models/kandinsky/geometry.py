"""How Kandinsky-5 cuts pixels into latents and tokens, and how far apart its rotary embedding puts these."""

from __future__ import annotations

from wan.config.geometry import Geometry

GEOMETRY = Geometry(vae_stride=(4, 8, 8), patch=(1, 2, 2))
# Up to this side, in pixels, tokens stand as far apart as in the training at 512x768; beyond, as in that at 1024x1024.
LARGEST_SD_SIDE = 854
SD_SCALE, HD_SCALE = (1.0, 2.0, 2.0), (1.0, 3.16, 3.16)


def rope_scale(size: tuple[int, int]) -> tuple[float, float, float]:
    """What the positions of (frames, rows, columns) are divided by, for pictures of (width, height) pixels."""
    return SD_SCALE if max(size) <= LARGEST_SD_SIDE else HD_SCALE
