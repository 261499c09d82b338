"""The tiny Kandinsky-5 checkpoint, and what the reference programs compute on it in float32, for the tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from wan.models.kandinsky import published
from wan.models.kandinsky.processor import TextMask, finish_transformer, install_processors, velocity_of

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "kandinsky-nano" / "checkpoint"
SCALE = (1.0, 2.0, 2.0)


@cache
def expected() -> dict[str, Tensor]:
    return load_file(DATA / "kandinsky-nano" / "expected.safetensors")


def plain_transformer() -> Kandinsky5Transformer3DModel:
    """diffusers' transformer of the set as it is, with its own processors."""
    (file,) = (CHECKPOINT / "model").iterdir()
    state = load_file(file)
    model = published.transformer({name: tuple(tensor.shape) for name, tensor in state.items()})
    model.load_state_dict(state, assign=True)
    finish_transformer(model, "cpu")
    return model.requires_grad_(False).eval()


def transformer() -> tuple[Kandinsky5Transformer3DModel, TextMask]:
    """The transformer of the set with our processors."""
    model = plain_transformer()
    return model, install_processors(model)


@torch.no_grad()
def velocity(model: nn.Module, scale: tuple[float, float, float] = SCALE, **more: Any) -> Tensor:
    """The velocity (T, h, w, C) of the set's latents, with its text."""
    given = expected()
    inputs = {
        "latents": given["dit.latents"].movedim(-1, 0)[None],
        "timestep": given["dit.timestep"],
        "text": given["dit.text"][None],
        "pooled": given["dit.pooled"],
    }
    return velocity_of(model, **inputs | more, scale=scale)[0].movedim(0, -1)


def component(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A component's configuration and its tensors."""
    (file,) = (CHECKPOINT / folder).glob("*.safetensors")
    return json.loads((CHECKPOINT / folder / "config.json").read_text()), load_file(file)
