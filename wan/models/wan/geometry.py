"""How Wan cuts pixels into latents and tokens."""

from __future__ import annotations

from wan.config.geometry import Geometry

GEOMETRY = Geometry(vae_stride=(4, 8, 8), patch=(1, 2, 2))
# Of the VAE of Wan2.2, which its small model alone has.
GEOMETRY_5B = Geometry(vae_stride=(4, 16, 16), patch=(1, 2, 2))
