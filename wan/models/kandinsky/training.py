"""How Kandinsky-5's transformer is trained on text to video: what clips are prepared with, what it sees of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel
from torch import Tensor, nn

from wan.checkpoints.component import Component
from wan.models.checkpoint import Checkpoint
from wan.models.kandinsky import components
from wan.models.kandinsky.diffusers_layout import config_of, write_index
from wan.models.kandinsky.encoder import KandinskyClipEncoder
from wan.models.kandinsky.geometry import GEOMETRY, rope_scale
from wan.models.kandinsky.latents import decode, draw_noise
from wan.models.kandinsky.layout import POSITIONS
from wan.models.kandinsky.processor import grid_of, install_processors, model_input
from wan.models.training import Takes, TrainingFacts, TrainingSpec
from wan.sampling.texts import pad_rows

# All linear layers of the blocks, of text too, but for modulations, as diffusers names them.
LORA_TARGETS = tuple(
    f"{attention}.{layer}"
    for attention in ("self_attention", "cross_attention")
    for layer in ("to_query", "to_key", "to_value", "out_layer")
) + ("feed_forward.in_layer", "feed_forward.out_layer")

PARTS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def facts(base: Checkpoint, expert: str | None = None) -> TrainingFacts:
    return TrainingFacts(LORA_TARGETS, PARTS)


def component(base: Checkpoint, expert: str | None = None) -> Component:
    return components.transformer_component(base)


def ready(states: Mapping[str, Tensor], text_length: int) -> dict[str, Tensor]:
    """Text states (L, C) with zeros added up to (text length, C), how many rows are text, and the pooled ones (P,)."""
    text = states["text"].float()
    rows = torch.tensor(len(text))
    return {"text": pad_rows(text, text_length), "rows": rows, "pooled": states["pooled"].float()}


def velocity(transformer: nn.Module, latents: Tensor, timestep: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
    """As `TrainingSpec.velocity`, of a batch of what `ready` gives. Types are left to autocast.

    Until the backward is done no other batch may be asked for: blocks that are computed again read the texts' mask.
    """
    own = getattr(transformer, "module", transformer)
    text, grid = texts["text"], grid_of(own, latents.shape[2:])
    positions = torch.arange(text.shape[1], device=latents.device)
    install_processors(own).rows = positions < texts["rows"][:, None]
    out = transformer(
        model_input(own, latents, None),
        text,
        timestep.float(),
        texts["pooled"],
        [torch.arange(size, device=latents.device) for size in grid],
        positions,
        scale_factor=rope_scale(GEOMETRY.size_of(latents.shape[2:])),
        return_dict=False,
    )
    return out.float().movedim(-1, 1)


def takes(config: Mapping[str, Any]) -> Takes:
    return Takes(config["in_visual_dim"], {"text": config["in_text_dim"], "pooled": config["in_text_dim2"]}, POSITIONS)


def prepare(transformer: Kandinsky5Transformer3DModel) -> None:
    """Processors that take padded texts, and in float32, whatever autocast would do, what inference has in it."""
    install_processors(transformer)
    kept = set(transformer._keep_in_fp32_modules)
    for name, module in transformer.named_modules():
        if name.rpartition(".")[2] in kept:
            module.forward = functools.partial(_in_float32, module)


def _in_float32(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return type(module).forward(module, x.float())


def own_config(config: Mapping[str, Any], base: Checkpoint, algorithm: str | None) -> dict[str, Any]:
    """diffusers' configuration, with the algorithm, and what the weights were published as, which says how they are
    sampled, by the names that `wan.models.kandinsky.layout` reads.
    """
    own = config_of(Kandinsky5Transformer3DModel, config)
    if "published_as" in base.config:
        own["published_as"] = base.config["published_as"]
    # What diffusers' own notes say of attention may be another one.
    own = {name: value for name, value in own.items() if not name.startswith("attention_")}
    return own if algorithm is None else own | {"sparse_algo": algorithm}


def write_part(base: Checkpoint, name: str, folder: Path) -> None:
    """A link, since the published layout has these as their own libraries do."""
    tokenizers = dict(zip(base.family.tokenizers, base.tokenizer_folders))
    folder.symlink_to((tokenizers[name] if name in tokenizers else base.folder_of(name)).resolve())


def write_lora(folder: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    Kandinsky5T2VPipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )


TRAINING = TrainingSpec(
    facts=facts,
    vae="AutoencoderKLHunyuanVideo",
    open_encoder=KandinskyClipEncoder,
    ready=ready,
    velocity=velocity,
    takes=takes,
    draw_noise=draw_noise,
    decode=decode,
    component=component,
    load=components.load_transformer,
    prepare=prepare,
    own_config=own_config,
    write_part=write_part,
    write_index=lambda folder, base, defaults: write_index(folder, defaults),
    write_lora=write_lora,
)
