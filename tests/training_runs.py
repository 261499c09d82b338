"""Tiny training runs for the tests: a synthetic dataset, settings, and what a run leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from wan.training.config import TrainingSettings
from wan.training.metrics import METRICS_FILE, read_metrics
from wan.training.schema import merge_settings
from wan.training.trainer import Trainer

TILE = [1, 2, 2]
TRANSFORMER = {
    "num_attention_heads": 2,
    "text_len": 96,
    "attention_head_dim": 12,
    "num_layers": 2,
    "ffn_dim": 32,
    "text_dim": 64,
    "freq_dim": 16,
}
# What a row says of the training itself, rather than of its speed.
EXACT = ("step", "loss", "lr", "grad_norm", "kept", "validation_dense", "validation_sparse")


class Colours:
    """Clips of one colour each, of two sizes; those of `bad` numbers have a frame too few, or no caption."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()):
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        colour = np.random.default_rng(index).integers(0, 256, 3, dtype=np.uint8)
        frames = 4 if index in self.bad else 5
        video = np.broadcast_to(colour, (frames, 32, 48 if index % 3 else 32, 3))
        return video, f"colour number {index}"


def settings_dict(checkpoint: Path, prepared: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A run of six steps on clips of `prepared`, as the content of a YAML file."""
    base = {
        "mode": "pretrain",
        "checkpoint": str(checkpoint),
        "out": str(out),
        "steps": 6,
        "attention": {"algorithm": "nabla-0.5", "tile": TILE},
        "data": {"train": str(prepared), "validation": str(prepared), "clips": 4},
        "optimizer": {"lr": 0.003, "warmup": 2},
        "batch_size": 4,
        "micro_batch": 2,
        "precision": "float32",
        "ema": 0.9,
        "every": {"checkpoint": 2, "validation": 3},
        "workers": 0,
    }
    if changes.get("mode", "pretrain") == "pretrain":
        base["transformer"] = TRANSFORMER
    return merge_settings(base, changes)


def train(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Run to the end in this process, and return what the run's metrics say of the training."""
    Trainer(TrainingSettings.from_dict(content)).run()
    return exact_rows(Path(content["out"]))


def exact_rows(run: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in EXACT if key in row} for row in read_metrics(run / METRICS_FILE)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def cut_after(run: Path, step: int, into: Path) -> None:
    """A copy of a run as if it had been killed between two checkpoints, while it wrote the next."""
    shutil.copytree(run, into, symlinks=True)
    for path in (into / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            path.rename(path.with_name(f".partial-{path.name}"))
            shutil.rmtree(path.with_name(f".partial-{path.name}") / "model")
    lines = (into / "metrics.jsonl").read_text().splitlines(keepends=True)
    (into / "metrics.jsonl").write_text("".join(lines[: step + 2]) + lines[-1][:20])
