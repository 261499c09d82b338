"""What training asks of a model family, in one frozen dataclass, and the family of a transformer that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from nabla import InputError
from wan.checkpoints.component import Component
from wan.config.settings import VideoSettings
from wan.models.checkpoint import Checkpoint
from wan.models.registry import FAMILIES

# Of the sizes of a new transformer, how many rows of text states it is to see.
TEXT_LENGTH = "text_len"
# What guides a forward: a tensor, or several by name; of one clip, or of a batch with one dimension more in front.
Texts = Tensor | dict[str, Tensor]


class Takes(NamedTuple):
    """What a transformer takes, off its configuration.

    channels: of latents
    columns: of each tensor of a caption, by its name
    positions: of its rotary table, along each axis
    """

    channels: int
    columns: Mapping[str, int]
    positions: int


class TrainingFacts(NamedTuple):
    """What of training differs from checkpoint to checkpoint of a family.

    lora_targets: names, or ends of names, of the layers that LoRA adapts unless a run says else
    transformer: the folder, in diffusers' layout, of the transformer that is trained
    parts: those of the other components, which stand beside it
    prepared_for: what clips are prepared for where they are not as those of the family's other checkpoints
    beside: names of tensors that are stored of a clip beside its latents and its caption
    least_frames: of a clip
    may_give_first: whether the transformer takes a first latent frame without noise
    """

    lora_targets: tuple[str, ...]
    parts: tuple[str, ...]
    transformer: str = "transformer"
    prepared_for: str = ""
    beside: tuple[str, ...] = ()
    least_frames: int = 1
    may_give_first: bool = False


class ClipEncoder(Protocol):
    """The VAE and the other encoders that clips are prepared with.

    fingerprints: what tells its VAE's encoder and its text encoders with their tokenizers from others
    """

    vae: nn.Module
    fingerprints: dict[str, str]

    def encode(self, video: Tensor) -> Tensor:
        """Float32 latents (B, C, T, h, w) of a video (B, 3, frames, height, width) in [-1, 1]."""

    def beside(self, videos: Tensor) -> list[dict[str, Tensor]]:
        """Of each of uint8 videos (B, frames, height, width, 3) what `TrainingFacts.beside` names, on the CPU."""

    def states(self, captions: list[str]) -> list[dict[str, Tensor]]:
        """Of each caption the tensors that are stored, on the CPU; "text" is (L, C), without rows past its end."""

    def cut_notes(self, captions: list[str]) -> list[str]:
        """A line for each caption that is longer than a text encoder takes."""


@dataclass(frozen=True)
class TrainingSpec:
    """How a family's transformer is trained.

    facts: what differs of a checkpoint, or of the expert of that name where it has several transformers. Raises
        `InputError` for one that cannot be trained
    vae: diffusers' class of the VAE, by which a folder without a transformer is told
    open_encoder: the `ClipEncoder` of a checkpoint, which needs no transformer; on a device, its VAE's encoder in a
        type, and whether clips are encoded in one pass rather than by chunks of frames
    ready: what `velocity` takes of one clip, from what is stored of its caption and beside its latents, and the rows of
        text that there may be
    velocity: the float32 velocity of noisy latents (B, C, T, h, w) at timesteps of 0 to 1000, guided by texts: (B,), or
        (B, T) of latent frames where `may_give_first`; the transformer may be within a wrapper, such as DDP's, through
        which the forward has to go
    takes: reads what a transformer takes off its configuration
    draw_noise: float32 noise (1, C, T, h, w) of a seed on a device, as generate.py draws it, for a transformer
    decode: the VAE and latents to a float32 video (B, 3, frames, height, width) in [-1, 1]
    component: the transformer of a checkpoint, of several the expert of that name
    load: reads the weights of that into a type, on a device; and shards it on the way, if there is what does
    prepare: changes a transformer that is loaded so that it computes, under autocast, what inference does
    own_config: the configuration to write for a transformer that was trained beside a checkpoint, for an algorithm of
        attention, or None where it is dense
    write_part: writes one of the parts of a checkpoint in the published layout to a folder, in diffusers' layout
    write_index: writes the files that tell diffusers' layout, of what was trained beside a checkpoint, for the defaults
        of sampling
    write_lora: writes adapters' weights, by the names of layers, and their configuration, as diffusers does
    new: a transformer with the weights that training begins with, from sizes, see the family's; None: cannot be had
    """

    facts: Callable[[Checkpoint, str | None], TrainingFacts]
    vae: str
    open_encoder: Callable[[Checkpoint, torch.device, torch.dtype, bool], ClipEncoder]
    ready: Callable[[Mapping[str, Tensor], int], Texts]
    velocity: Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
    takes: Callable[[Mapping[str, Any]], Takes]
    draw_noise: Callable[[nn.Module, VideoSettings, int, torch.device], Tensor]
    decode: Callable[[nn.Module, Tensor], Tensor]
    component: Callable[[Checkpoint, str | None], Component]
    load: Callable[[Component, torch.dtype, torch.device | str, Callable[[nn.Module], None] | None], nn.Module]
    prepare: Callable[[nn.Module], None]
    own_config: Callable[[Mapping[str, Any], Checkpoint, str | None], dict[str, Any]]
    write_part: Callable[[Checkpoint, str, Path], None]
    write_index: Callable[[Path, Checkpoint, Mapping[str, Any]], None]
    write_lora: Callable[[Path, dict[str, Tensor], dict[str, Any]], None]
    new: Callable[[dict[str, Any], torch.device], nn.Module] | None = None


def training_of(transformer: nn.Module) -> TrainingSpec:
    """How a transformer is trained, which may be within DDP's wrapper; raises `InputError` if none can."""
    own = getattr(transformer, "module", transformer)
    for family in FAMILIES:
        # Its other classes run with more than texts, which clips are not prepared with.
        if isinstance(own, family.load_transformer_specs()[0].kind):
            return family.load_training()
    raise InputError(f"{type(own).__name__} is of no class that is known to train, so it cannot be trained")


def join_texts(join: Callable[[list[Tensor]], Tensor], texts: Sequence[Texts]) -> Texts:
    """Texts as one, such as those of several clips by `torch.stack`: each of their tensors with those of its name."""
    if isinstance(texts[0], Tensor):
        return join(cast(list[Tensor], list(texts)))
    named = cast(Sequence[dict[str, Tensor]], texts)
    return {name: join([text[name] for text in named]) for name in named[0]}
