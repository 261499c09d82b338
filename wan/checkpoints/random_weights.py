"""What checkpoints of random weights are made of: values that keep activations near unit size, captions, folders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nabla import InputError


def random_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, scale: float | None = None
) -> Tensor:
    """Values for a tensor by its name, on the generator's device: zeros for a bias, ones for a norm, else normal.

    scale: of normal values; None takes that of a layer which keeps the size of what goes in
    """
    device = generator.device
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype, device=device)
    if name.endswith("gamma") or (len(shape) == 1 and "norm" in name):
        return torch.ones(shape, dtype=dtype, device=device)
    # Products of fan-in f scale by f^(-1/2).
    scale = math.prod(shape[1:]) ** -0.5 if scale is None else scale
    return torch.empty(shape, dtype=dtype, device=device).normal_(0, scale, generator=generator)


def make_empty(folder: Path) -> None:
    """Make a directory, and those above it; raises `InputError` for one that is there and holds something."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; choose a new directory, so that nothing is written over")


def captions() -> Iterator[str]:
    """Of simple scenes, to train small tokenizers on."""
    colours, things = ("red", "green", "blue", "yellow"), ("circle", "square", "cat", "boat", "tree", "river")
    places = ("on a white background", "under a cloudy sky", "at night in the city", "in front of a mountain")
    moves = ("moves from left to right", "jumps high", "turns slowly", "waits quietly")
    return (f"A {c} {t} {m} {p}." for c in colours for t in things for m in moves for p in places)
