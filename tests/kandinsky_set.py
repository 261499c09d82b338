"""The tiny Kandinsky-5 checkpoint, and what the reference programs compute on it in float32, for the tests."""

from __future__ import annotations

import json
from functools import cache, partial
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
from wan.parallel.distributed import DistributedContext

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


def small_transformer(heads: int) -> Kandinsky5Transformer3DModel:
    """Of random weights and so many heads of 16, for the set's latents and texts."""
    torch.manual_seed(heads)
    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 48, "in_text_dim2": 32, "visual_cond": True}
    sizes |= {"model_dim": 16 * heads, "axes_dims": (4, 6, 6), "ff_dim": 64, "time_dim": 20}
    model = Kandinsky5Transformer3DModel(num_text_blocks=1, num_visual_blocks=2, **sizes)
    # Modulations start as zeros, by which no block would do anything.
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    return model.requires_grad_(False).eval()


def pipeline(
    model: Kandinsky5Transformer3DModel | None = None,
    tokenizers: tuple[Any, Any] = (None, None),
    processes: DistributedContext | None = None,
) -> Kandinsky5:
    """A pipeline of the set, or with another transformer; with encoders on the process that leads alone."""
    models: dict[str, nn.Module | None] = dict.fromkeys(ENCODERS)
    if processes is None or processes.is_leader:
        models = {folder: encoder(folder) for folder in ENCODERS}
    cpu, video = torch.device("cpu"), VideoSettings((64, 48), 9, 24)
    model = transformer()[0] if model is None else model
    form = cpu, cpu, 256, False, SamplingSettings("euler"), video, processes
    return Kandinsky5(model, *models.values(), *tokenizers, *form)


def encoder(folder: str) -> nn.Module:
    """One of the set's models beside the transformer, as a pipeline has it."""
    build, rename, finish = ENCODERS[folder]
    config, state = component(folder)
    own = {rename(name): tensor.float() for name, tensor in state.items() if rename(name) is not None}
    model = build(config, {name: tuple(tensor.shape) for name, tensor in own.items()})
    model.load_state_dict(own, assign=True)
    finish(model)
    return model.requires_grad_(False).eval()


ENCODERS = {
    "vae": (published.vae, str, partial(prepare_decoder, dtype=torch.float32)),
    "text_encoder": (
        published.text_encoder,
        published.text_encoder_name,
        partial(published.finish_text_encoder, device="cpu"),
    ),
    "text_encoder2": (
        published.text_encoder_2,
        published.text_encoder_2_name,
        partial(published.finish_text_encoder_2, device="cpu"),
    ),
}
