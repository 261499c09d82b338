"""How Wan2.1 cuts pixels into latents and tokens."""

from __future__ import annotations

from wan.config.geometry import Geometry

GEOMETRY = Geometry(vae_stride=(4, 8, 8), patch=(1, 2, 2))
