"""Checkpoints of Kandinsky-5's sizes with random weights, in either layout: real speed and memory, no pictures."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLHunyuanVideo, ConfigMixin, Kandinsky5Transformer3DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, Qwen2_5_VLTextModel

from nabla import InputError
from wan.checkpoints import random_weights
from wan.checkpoints.component_files import DIFFUSERS_STEM, TRANSFORMERS_STEM
from wan.checkpoints.random_weights import make_empty
from wan.checkpoints.saving import save_json, save_shards, save_whole
from wan.memory.estimates import Weights
from wan.memory.weigh import weigh
from wan.models.kandinsky.diffusers_layout import config_of, write_index
from wan.models.kandinsky.memory import with_text_blocks
from wan.models.kandinsky.processor import FLOAT32_MODULES, finish_transformer
from wan.models.kandinsky.published import finish_text_encoder, finish_text_encoder_2
from wan.models.kandinsky.random_sizes import (
    MODELS,
    Sizes,
    meta_transformer,
    meta_vae,
    transformer_shapes,
    vae_shapes,
)
from wan.models.kandinsky.random_text import (
    Shapes,
    clip_config,
    clip_shapes,
    clip_tokenizer,
    meta_clip,
    meta_qwen,
    qwen_config,
    qwen_shapes,
    qwen_tokenizer,
)
from wan.models.kandinsky.text import CLIP_DTYPE

M = TypeVar("M", bound=nn.Module)
Drawing = Callable[[Shapes, torch.dtype], Iterator[tuple[str, Tensor]]]
# By the layout, folders that have other names than in diffusers' layout.
FOLDERS = {
    "published": {"tokenizer": "text_encoder", "text_encoder_2": "text_encoder2", "tokenizer_2": "text_encoder2"},
    "diffusers": {},
}
LAYOUTS = tuple(FOLDERS)


def random_transformer(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    layers: int | None = None,
    place: Callable[[Kandinsky5Transformer3DModel], Callable[[str, Tensor], Tensor]] | None = None,
) -> Kandinsky5Transformer3DModel:
    """The transformer of the size of `model`, a key of `MODELS`, with random weights, without a checkpoint on disk.

    layers: how many visual blocks instead of the model's own
    place: from the model to what is done with each tensor by its name, as it is drawn on the device
    """
    transformer = meta_transformer(MODELS[model], layers)
    draw = functools.partial(random_tensor, generator=torch.Generator(device).manual_seed(seed))
    random_weights.fill(transformer, dtype, FLOAT32_MODULES, draw, place)
    finish_transformer(transformer, device)
    return transformer.requires_grad_(False).eval()


def random_vae(
    model: str, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32
) -> AutoencoderKLHunyuanVideo:
    """The VAE of `model` with random weights."""
    return _drawn(meta_vae(MODELS[model]), dtype, device, seed).to(device)


def random_text_encoder(model: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Qwen2_5_VLTextModel:
    """The language model of `model` with random weights, drawn on a device, in host memory."""
    encoder = _drawn(meta_qwen(MODELS[model].qwen), dtype, device, seed)
    finish_text_encoder(encoder, "cpu")
    return encoder


def random_text_encoder_2(model: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> CLIPTextModel:
    """CLIP's text model of `model` with random weights, drawn on a device, in host memory."""
    encoder = _drawn(meta_clip(MODELS[model].clip), dtype, device, seed)
    finish_text_encoder_2(encoder, "cpu")
    return encoder


def _drawn(model: M, dtype: torch.dtype, device: torch.device, seed: int) -> M:
    """A model on the meta device with random weights, drawn on a device, in host memory."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = {name: random_tensor(name, shape, dtype, generator).cpu() for name, shape in shapes.items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


@functools.cache
def weigh_models(sizes: Sizes, dtype: torch.dtype, layers: int | None = None) -> tuple[Weights, Weights, int]:
    """What `planner.choose` has to know of the models: the transformer, the text encoders together, and bytes of the
    VAE, which is in float32.
    """
    transformer, qwen = meta_transformer(sizes, layers), meta_qwen(sizes.qwen)
    clip = sum(map(math.prod, clip_shapes(sizes.clip).values())) * CLIP_DTYPE.itemsize
    text = weigh(qwen, qwen.layers, dtype, ())
    return (
        with_text_blocks(
            weigh(transformer, transformer.visual_transformer_blocks, dtype, FLOAT32_MODULES), transformer, dtype
        ),
        replace(text, rest=text.rest + clip),
        sum(map(math.prod, vae_shapes(sizes).values())) * torch.float32.itemsize,
    )


def write(
    model: str,
    folder: Path,
    dtype: torch.dtype,
    layout: str = "published",
    file_name: str | None = None,
    sparse_algorithm: str | None = None,
    seed: int = 0,
) -> None:
    """Write a checkpoint of the size of `model`, a key of `MODELS`, with its text encoders and its VAE.

    dtype: of the transformer
    layout: one of `LAYOUTS`
    file_name: of the transformer in the published layout, without its ending
    sparse_algorithm: the attention that diffusers' layout names; the published one has no place for it
    """
    sizes = MODELS[model]
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is not known; use one of {', '.join(LAYOUTS)}")
    if layout == "published" and sparse_algorithm is not None:
        raise InputError(f"the published layout has no place for {sparse_algorithm!r}; write that of diffusers")
    algorithm = sizes.algorithm if sparse_algorithm is None else sparse_algorithm
    # Refused before anything is written.
    config = _config_of(meta_transformer(sizes, algorithm=algorithm))
    make_empty(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draw = functools.partial(_stream, generator=torch.Generator(device).manual_seed(seed))
    shapes = transformer_shapes(sizes)
    if layout == "published":
        file = _made(folder / "model") / f"{file_name or sizes.file}.safetensors"
    else:
        own = _made(folder / "transformer")
        file = own / f"{DIFFUSERS_STEM}.safetensors"
        save_json(config, own / "config.json")
        write_index(folder, {})
    save_whole(draw(shapes, dtype), shapes, dtype, file)
    _write_others(sizes, folder, FOLDERS[layout], draw)


def _write_others(sizes: Sizes, folder: Path, names: Mapping[str, str], draw: Drawing) -> None:
    """The VAE, the text encoders and their tokenizers; `names`: of their folders, where these are not diffusers'."""

    def place(name: str) -> Path:
        return _made(folder / names.get(name, name))

    save_json(_config_of(meta_vae(sizes)), place("vae") / "config.json")
    save_shards(draw(vae_shapes(sizes), torch.float32), place("vae"), DIFFUSERS_STEM)
    save_json(qwen_config(sizes.qwen), place("text_encoder") / "config.json")
    save_shards(draw(qwen_shapes(sizes.qwen), torch.bfloat16), place("text_encoder"), TRANSFORMERS_STEM)
    save_json(clip_config(sizes.clip), place("text_encoder_2") / "config.json")
    save_shards(draw(clip_shapes(sizes.clip), torch.float32), place("text_encoder_2"), TRANSFORMERS_STEM)
    qwen_tokenizer(sizes.qwen.vocabulary).save_pretrained(place("tokenizer"))
    clip_tokenizer(sizes.clip.vocabulary).save_pretrained(place("tokenizer_2"))


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _stream(shapes: Shapes, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Random tensors in host memory, drawn as they are taken, so that no more than a file of them is there."""
    return ((name, random_tensor(name, shape, dtype, generator).cpu()) for name, shape in shapes.items())


def _config_of(model: ConfigMixin) -> dict[str, Any]:
    return config_of(type(model), model.config)


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values for a published name, on the generator's device, that keep activations near unit size at any depth."""
    scale = None
    if "embed_tokens" in name or name.endswith("_embedding.weight"):
        # Rows of tables of tokens and of positions are of unit size.
        scale = 1.0
    elif "modulation" in name:
        # Their input is of unit size. Gates of a quarter of it keep the sum of a hundred blocks' additions small.
        scale = shape[-1] ** -0.5 / 4
    return random_weights.random_tensor(name, shape, dtype, generator, scale)
