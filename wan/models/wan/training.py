"""How Wan's transformers are trained: what they see of clips, what of them differs by kind, what is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from nabla import InputError
from wan.checkpoints.component import Component
from wan.checkpoints.component_files import DIFFUSERS_STEM, TRANSFORMERS_STEM
from wan.config.settings import VideoSettings
from wan.models.checkpoint import Checkpoint
from wan.models.training import TEXT_LENGTH, Takes, Texts, TrainingFacts, TrainingSpec
from wan.models.wan import components
from wan.models.wan.clip_encoder import WanClipEncoder
from wan.models.wan.diffusers_layout import write_component, write_index
from wan.models.wan.geometry import GEOMETRY
from wan.models.wan.image_encoder import check_text_rows, image_encoder_component
from wan.models.wan.kinds import EXPERTS, kind_of
from wan.models.wan.latents import decode, draw_noise
from wan.models.wan.layout import IMAGE_ENCODER, OWN_KEYS
from wan.models.wan.new_transformer import new_transformer
from wan.models.wan.picture import given_mask
from wan.models.wan.processor import grid_of
from wan.sampling.texts import pad_rows

# All linear layers of a block as diffusers names them, those of self- and cross-attention alike.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
# Those by which a block sees states of pictures.
PICTURE_TARGETS = ("add_k_proj", "add_v_proj")
PARTS = ("vae", "text_encoder", "tokenizer")
TRANSFORMERS = dict(zip(EXPERTS, ("transformer", "transformer_2")))


def facts(base: Checkpoint, expert: str | None = None) -> TrainingFacts:
    """As of `TrainingSpec`."""
    kind = kind_of(base.layout)
    if kind.name == "vace":
        raise InputError(f"vace cannot be trained here, and {base.name} is of it; take a checkpoint of another kind")
    sees_states = IMAGE_ENCODER in base.component_files
    if sees_states:
        check_text_rows(base.text_length)
    own = TRANSFORMERS.get(expert, "transformer")
    return TrainingFacts(
        lora_targets=LORA_TARGETS + (PICTURE_TARGETS if sees_states else ()),
        parts=PARTS
        + ((IMAGE_ENCODER.name,) if sees_states else ())
        + tuple(name for name in TRANSFORMERS.values() if base.boundary is not None and name != own),
        transformer=own,
        # Both kinds from text alone have one VAE.
        prepared_for="" if kind.name in ("t2v", "t2v-A14B") else kind.name,
        beside=(("given",) if kind.inputs.required else ()) + (("pictures",) if sees_states else ()),
        # Of a single frame the last one would be the first.
        least_frames=1 + kind.geometry.vae_stride[0] if "last_image" in kind.inputs.required else 1,
        may_give_first="image" in kind.inputs.optional,
    )


def component(base: Checkpoint, expert: str | None = None) -> Component:
    return components.transformer_component(base, None, expert)


def ready(states: Mapping[str, Tensor], text_length: int) -> Texts:
    """Text states (L, C) as float32 (text length, C), zeros past their end.

    Of a clip that begins with a picture several: "text", "given", what stands beside the noise, (20, T, h, w), and
    "pictures", where there are states of them.
    """
    text = pad_rows(states["text"].float()[None], text_length)[0]
    if "given" not in states:
        return text
    given = states["given"].float()
    video = VideoSettings(GEOMETRY.size_of(given.shape[1:]), GEOMETRY.frames_of(given.shape[1]))
    mask = given_mask(video, last=len(states.get("pictures", ())) > 1)[0]
    seen = {"text": text, "given": torch.cat((mask, given))}
    return seen | ({"pictures": states["pictures"].float()} if "pictures" in states else {})


def velocity(transformer: nn.Module, latents: Tensor, timestep: Tensor, texts: Texts) -> Tensor:
    """As `TrainingSpec.velocity`, of a batch of what `ready` gives. Types are left to autocast."""
    if timestep.ndim == 2:
        _, rows, columns = grid_of(getattr(transformer, "module", transformer), latents.shape[2:])
        # Of each token, as those of a frame follow one another.
        timestep = timestep.repeat_interleave(rows * columns, dim=1)
    if isinstance(texts, Tensor):
        return transformer(latents, timestep, texts, return_dict=False)[0].float()
    latents = torch.cat((latents, texts["given"]), dim=1)
    # Those of a clip one after the other, as diffusers puts two together.
    states = texts["pictures"].flatten(0, 1) if "pictures" in texts else None
    out = transformer(latents, timestep, texts["text"], encoder_hidden_states_image=states, return_dict=False)
    return out[0].float()


def takes(config: Mapping[str, Any]) -> Takes:
    columns = {"text": config["text_dim"]}
    if config.get("image_dim"):
        columns["pictures"] = config["image_dim"]
    # What stands beside the noise has channels of its own.
    channels = config.get("out_channels") or config["in_channels"]
    return Takes(channels, columns, config["rope_max_seq_len"])


def embed_time_in_float32(transformer: WanTransformer3DModel) -> None:
    """As inference has it, whatever autocast would do."""
    embedder = transformer.condition_embedder.time_embedder
    embedder.forward = torch.autocast(transformer.device.type, enabled=False)(embedder.forward)


def own_config(config: Mapping[str, Any], base: Checkpoint, algorithm: str | None) -> dict[str, Any]:
    """diffusers' configuration, and the rows of text and the algorithm that `wan.models.wan.layout` reads.

    Of two experts the one that is trained says the same of both as the other, whatever it was trained with.
    """
    # Such keys are diffusers' own notes on how the model was loaded.
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    own = {"_class_name": WanTransformer3DModel.__name__} | own
    own |= said_by(base, (TEXT_LENGTH,))
    if base.boundary is not None:
        return own | said_by(base)
    return own if algorithm is None else own | {"sparse_algo": algorithm}


def said_by(base: Checkpoint, keys: Sequence[str] = OWN_KEYS) -> dict[str, Any]:
    """What a checkpoint's configuration says beyond what diffusers' class takes."""
    return {key: base.config[key] for key in keys if key in base.config}


def write_part(base: Checkpoint, name: str, folder: Path) -> None:
    if name == "vae":
        write_component(components.vae_component(base), folder, DIFFUSERS_STEM)
    elif name == "text_encoder":
        write_component(components.text_encoder_component(base, torch.float32), folder, TRANSFORMERS_STEM)
    elif name == IMAGE_ENCODER.name:
        write_component(image_encoder_component(base), folder, TRANSFORMERS_STEM)
    elif name in TRANSFORMERS.values():
        expert = next(expert for expert, own in TRANSFORMERS.items() if own == name)
        write_component(component(base, expert), folder, DIFFUSERS_STEM, said_by(base))
    else:
        shutil.copytree(base.tokenizer_folder, folder)


def write_lora(folder: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)


TRAINING = TrainingSpec(
    facts=facts,
    vae="AutoencoderKLWan",
    open_encoder=WanClipEncoder,
    ready=ready,
    velocity=velocity,
    takes=takes,
    draw_noise=draw_noise,
    decode=decode,
    component=component,
    load=components.load_transformer,
    prepare=embed_time_in_float32,
    own_config=own_config,
    write_part=write_part,
    write_index=lambda folder, base, defaults: write_index(folder, defaults, base.layout),
    write_lora=write_lora,
    new=new_transformer,
)
