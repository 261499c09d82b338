"""How Wan2.1's transformer is trained: what its clips are prepared with, what it sees of them, what is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from wan.checkpoints.component_files import DIFFUSERS_STEM, TRANSFORMERS_STEM
from wan.checkpoints.fingerprints import fingerprint_models
from wan.models.checkpoint import TOKENIZER_FILE, Checkpoint
from wan.models.training import TEXT_LENGTH, Takes, TrainingSpec
from wan.models.wan import components
from wan.models.wan.diffusers_layout import write_component, write_index
from wan.models.wan.latents import decode, draw_noise, encode
from wan.models.wan.new_transformer import new_transformer
from wan.models.wan.text import cut_note, tokenize
from wan.models.wan.vae import speed_up_encoder
from wan.models.wan.whole_clips import posterior, take_whole_clips
from wan.sampling.texts import pad_rows

# All linear layers of a block as diffusers names them, those of self- and cross-attention alike.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


class WanClipEncoder:
    """The VAE, its encoder in `vae_dtype`, text encoder and tokenizer; a `wan.models.training.ClipEncoder`.

    whole_clips: encode clips in one pass rather than by chunks of four frames
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, vae_dtype: torch.dtype, whole_clips: bool):
        self.device, self.length = device, checkpoint.text_length
        self.vae = components.vae_component(checkpoint).load(torch.float32, device)
        # Latents are normalised by them, so clips of other statistics are others. Before the encoder is made faster,
        # which changes types and layouts.
        statistics = repr((list(self.vae.config.latents_mean), list(self.vae.config.latents_std)))
        self.fingerprints = {"vae": fingerprint_models(statistics.encode(), self.vae.encoder, self.vae.quant_conv)}
        speed_up_encoder(self.vae, vae_dtype)
        self.posterior = posterior if whole_clips else None
        if whole_clips:
            take_whole_clips(self.vae.encoder)
        # CPUs may have no instructions for bfloat16, in which it takes a hundred times as long.
        text_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.text_encoder = components.text_encoder_component(checkpoint, text_dtype).load(text_dtype, device)
        self.tokenizer = components.load_tokenizer(checkpoint, self.text_encoder.config.vocab_size)
        # What else decides which tokens the encoder sees.
        reading = (checkpoint.tokenizer_folder / TOKENIZER_FILE).read_bytes() + str(self.length).encode()
        self.fingerprints["text_encoder"] = fingerprint_models(reading, self.text_encoder)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Float32 latents (B, C, T, h, w) of a video (B, 3, 4 T - 3 frames, height, width) in [-1, 1]."""
        return encode(self.vae, video, self.posterior)

    @torch.no_grad()
    def states(self, captions: list[str]) -> list[dict[str, Tensor]]:
        """The text states of each caption, (L, C) on the CPU, without the rows past its end."""
        ids, mask = tokenize(self.tokenizer, captions, self.length)
        states = self.text_encoder(ids.to(self.device), mask.to(self.device)).last_hidden_state.cpu()
        return [{"text": state[: row.sum()]} for state, row in zip(states, mask)]

    def cut_notes(self, captions: list[str]) -> list[str]:
        """A line for each caption that is longer than the text encoder takes."""
        return [note for one in captions if (note := cut_note(self.tokenizer, one, self.length)) is not None]


def ready(states: Mapping[str, Tensor], text_length: int) -> Tensor:
    """Text states (L, C) as float32 (text length, C), zeros past their end."""
    return pad_rows(states["text"].float()[None], text_length)[0]


def velocity(transformer: nn.Module, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """As `TrainingSpec.velocity`, of text states (B, L, C). Types are left to autocast."""
    return transformer(latents, timestep, text, return_dict=False)[0].float()


def takes(config: Mapping[str, Any]) -> Takes:
    return Takes(config["in_channels"], {"text": config["text_dim"]}, config["rope_max_seq_len"])


def embed_time_in_float32(transformer: WanTransformer3DModel) -> None:
    """As inference has it, whatever autocast would do."""
    embedder = transformer.condition_embedder.time_embedder
    embedder.forward = torch.autocast(transformer.device.type, enabled=False)(embedder.forward)


def own_config(config: Mapping[str, Any], base: Checkpoint, algorithm: str | None) -> dict[str, Any]:
    """diffusers' configuration, and the rows of text and the algorithm that `wan.models.wan.layout` reads."""
    # Such keys are diffusers' own notes on how the model was loaded.
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    own = {"_class_name": WanTransformer3DModel.__name__} | own
    if TEXT_LENGTH in base.config:
        own[TEXT_LENGTH] = base.config[TEXT_LENGTH]
    return own if algorithm is None else own | {"sparse_algo": algorithm}


def write_part(base: Checkpoint, name: str, folder: Path) -> None:
    if name == "vae":
        write_component(components.vae_component(base), folder, DIFFUSERS_STEM)
    elif name == "text_encoder":
        write_component(components.text_encoder_component(base, torch.float32), folder, TRANSFORMERS_STEM)
    else:
        shutil.copytree(base.tokenizer_folder, folder)


def write_lora(folder: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)


TRAINING = TrainingSpec(
    parts=("vae", "text_encoder", "tokenizer"),
    vae="AutoencoderKLWan",
    lora_targets=LORA_TARGETS,
    open_encoder=WanClipEncoder,
    ready=ready,
    velocity=velocity,
    takes=takes,
    draw_noise=draw_noise,
    decode=decode,
    component=components.transformer_component,
    load=components.load_transformer,
    prepare=embed_time_in_float32,
    own_config=own_config,
    write_part=write_part,
    write_index=write_index,
    write_lora=write_lora,
    new=new_transformer,
)
