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

from wan.config.settings import SamplingSettings, VideoSettings
from wan.models.kandinsky import published
from wan.models.kandinsky.pipeline import Kandinsky5
from wan.models.kandinsky.processor import TextMask, finish_transformer, install_processors, velocity_of
from wan.models.kandinsky.vae import prepare_decoder

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


def pipeline() -> Kandinsky5:
    """A pipeline of the set, which has no tokenizers."""
    models = {}
    for folder, build, rename in (
        ("vae", published.vae, str),
        ("text_encoder", published.text_encoder, published.text_encoder_name),
        ("text_encoder2", published.text_encoder_2, published.text_encoder_2_name),
    ):
        config, state = component(folder)
        own = {rename(name): tensor.float() for name, tensor in state.items() if rename(name) is not None}
        models[folder] = build(config, {name: tuple(tensor.shape) for name, tensor in own.items()})
        models[folder].load_state_dict(own, assign=True)
        models[folder].requires_grad_(False).eval()
    published.finish_text_encoder(models["text_encoder"], "cpu")
    published.finish_text_encoder_2(models["text_encoder2"], "cpu")
    prepare_decoder(models["vae"], torch.float32)
    cpu = torch.device("cpu")
    model, _ = transformer()
    sampling, video = SamplingSettings("euler"), VideoSettings((64, 48), 9, 24)
    texts = models["text_encoder"], models["text_encoder2"], None, None
    return Kandinsky5(model, models["vae"], *texts, cpu, cpu, 256, False, sampling, video)
