"""What checkpoints of random weights are made of: values that keep activations near unit size, captions, folders."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def fill(
    model: nn.Module,
    dtype: torch.dtype,
    float32: Collection[str],
    draw: Callable[[str, tuple[int, ...], torch.dtype], Tensor],
    place: Callable[[Any], Callable[[str, Tensor], Tensor]] | None = None,
) -> None:
    """Give a model on the meta device weights that are drawn, each in the type that `Component.load` would read it in.

    float32: names of what stays in that; draw: makes a tensor of a name, shape and type
    place: from the model to what is done with each tensor by its name, as it is drawn
    """
    placed = (lambda name, tensor: tensor) if place is None else place(model)
    state = {}
    for name, tensor in model.state_dict().items():
        kept = torch.float32 if set(name.split(".")) & set(float32) else dtype
        state[name] = placed(name, draw(name, tuple(tensor.shape), kept))
    model.load_state_dict(state, assign=True)


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
