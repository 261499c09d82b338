"""Tiny runs of the trainers of `shapes` for the tests: settings as the content of YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wan.training.schema import merge_settings

# A run of the text encoder, but for its folder.
SMALL_TEXT_RUN = {
    "steps": 12,
    "encoder": {"width": 32, "layers": 1, "heads": 2, "head_size": 16, "ffn_width": 48},
    "vocabulary": 400,
    "tokenizer_captions": 300,
    "batch_size": 8,
    "lr": 1e-2,
    "warmup": 4,
    "precision": "float32",
    "held_out": 4,
    "save_every": 5,
}


def vae_settings_dict(out: Path, **changes: Any) -> dict[str, Any]:
    """A run of six small steps of the VAE."""
    base = {
        "out": str(out),
        "steps": 6,
        "vae": {"base_dim": 4, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        "cuts": [
            {"batch": 2, "size": "32*32", "frames": 5, "clips": 9},
            {"batch": 3, "size": "16*32", "frames": 1, "drawn": "48*40", "clips": 5},
        ],
        "video_frames": 5,
        "optimizer": {"lr": 0.003, "warmup": 2, "schedule": "cosine"},
        "matrix_lr": 0.01,
        "validation": {"every": 3, "clips": 2, "sizes": ["32*32", "16*16"]},
        "precision": "float32",
        "statistics_clips": 12,
        "dtype": "float32",
    }
    return merge_settings(base, changes)
