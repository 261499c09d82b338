"""Tiny training runs of Wan's other kinds for the tests: clips, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from training_runs import settings_dict

from wan.training.encoder import Encoder
from wan.training.models import open_components
from wan.training.prepare import prepare
from wan.training.prepare_settings import PrepareSettings


class Moving:
    """Clips of noise, whose frames all differ, of one size."""

    def __init__(self, count: int, size: tuple[int, int] = (32, 32), frames: int = 5):
        self.count, self.shape = count, (frames, size[1], size[0], 3)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        return np.random.default_rng(index).integers(0, 256, self.shape, dtype=np.uint8), f"clip number {index}"


def prepare_clips(base: Path, out: Path, count: int = 4, **options: Any) -> Path:
    settings = PrepareSettings(str(base), str(out), clips_per_shard=3, dtype="float32")
    encoder = Encoder(open_components(base), torch.device("cpu"))
    assert prepare(Moving(count, **options), settings, encoder) == (count, 0)
    return out


def family_settings(base: Path, prepared: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A run of two steps of two clips that fine-tunes, dense."""
    quick = {"mode": "finetune", "attention": None, "steps": 2, "batch_size": 2, "micro_batch": 2, "ema": None}
    quick |= {"every": {"checkpoint": 2, "validation": 2}, "optimizer": {"lr": 0.01, "warmup": 0}}
    return settings_dict(base, prepared, out, **quick | changes)
