"""What tells weights and prepared clips from others that may have come in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

# Values of each weight that a fingerprint takes: those of a large text encoder would all take minutes.
FINGERPRINT_VALUES = 4096


def fingerprint_models(besides: bytes, *models: nn.Module) -> str:
    """Of values of every weight, rounded to what they are in any type and on any device, and of other bytes."""
    digest = hashlib.sha256(besides)
    for model in models:
        for name, weight in model.state_dict().items():
            # bfloat16, since text encoders are float32 on a CPU and bfloat16 on a GPU.
            values = weight.flatten()[:: max(1, weight.numel() // FINGERPRINT_VALUES)].to("cpu", torch.bfloat16)
            digest.update(f"{name} {tuple(weight.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_files(files: Iterable[Path]) -> str:
    """Of safetensors in their order, whatever their folder: names, shapes, metadata, middles of tensors.

    A middle is a row, read from one place: weights that were trained on, and clips that were made anew, differ in it.
    """
    digest = hashlib.sha256()
    for path in files:
        with safe_open(path, "pt") as file:
            digest.update(f"{path.name} {sorted((file.metadata() or {}).items())}".encode())
            for name in sorted(file.keys()):
                tensor = file.get_slice(name)
                shape = tensor.get_shape()
                middle = tensor[tuple(slice(size // 2, size // 2 + 1) for size in shape[:-1])].flatten()
                digest.update(f"{name} {shape} {middle.dtype}".encode())
                digest.update(middle.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
