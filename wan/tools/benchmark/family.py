"""What benchmarks have to know of a family whose models they measure, in one frozen dataclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wan.attention.spec import TransformerSpec
from wan.config.geometry import Geometry
from wan.config.settings import VideoSettings
from wan.memory.estimates import Weights, Workload
from wan.sampling.loop import Conditions, Predict

# Of the timesteps any will do: times do not depend on it.
TIMESTEP = 500


class Sampled(NamedTuple):
    """What the sampling loop is called with: noise (1, C, T, h, w) in float32, a model, and texts of both branches."""

    latents: Tensor
    predict: Predict
    conditions: Conditions


def no_others(sizes: Any) -> dict[str, int]:
    """Of families with one transformer, in which pictures have no encoder of their own."""
    return {}


@dataclass(frozen=True)
class BenchmarkFamily:
    """A family of models with random weights.

    models: their sizes by name, with heads and width as `heads` and `dim`
    modes: those that measure them
    random_transformer: makes one, on its device
    as_diffusers, as_ours: turn it, in place and as often as one likes, into what is compared
    forward: a forward of a video, or of a batch of videos, as the model is then
    sampled: the same for the sampling loop
    solver: that the family's pipeline runs
    all_blocks: of a transformer: what is streamed and quantised, those that run before the ones in `spec` first
    float32: modules of it by name that stay in that, and so are not quantised
    weigh_models, workload_for, others_of: what its models and a video take, for a plan of memory
    random_text_encoder: makes the larger one, in host memory
    text_blocks: of it
    encode: its states of token ids (B, L)
    text_tokens: that it sees at the most
    random_vae: makes one in float32, on its device
    prepare_decoder, decode: as the family's pipeline decodes
    prepare_encoder, encode_video: the same of a video (1, 3, frames, height, width), where anything is given
    make_pipeline: of models where they wait, and what its videos are given, where mode `run` measures it
    write_small: writes a checkpoint of the family, where mode `serve` measures it
    decoder_baseline: what the decoder is before that, in the rows' names
    videos: the size and frames that a model is measured at; for others the program has them
    """

    models: Mapping[str, Any]
    modes: frozenset[str]
    geometry: Geometry
    spec: TransformerSpec
    random_transformer: Callable[..., Any]
    as_diffusers: Callable[[Any], None]
    as_ours: Callable[[Any], object]
    forward: Callable[..., Callable[[], Tensor]]
    sampled: Callable[[Any, VideoSettings], Sampled]
    solver: str
    all_blocks: Callable[[Any], nn.ModuleList]
    weigh_models: Callable[..., tuple[Weights, Weights, int]]
    workload_for: Callable[..., Workload]
    random_text_encoder: Callable[..., Any]
    text_blocks: Callable[[Any], nn.ModuleList]
    encode: Callable[[Any, Tensor], Tensor]
    text_tokens: int
    random_vae: Callable[..., Any]
    prepare_decoder: Callable[[Any, torch.dtype], None]
    decode: Callable[[Any, Tensor], Tensor]
    others_of: Callable[[Any], dict[str, int]] = no_others
    prepare_encoder: Callable[[Any, torch.dtype], None] | None = None
    encode_video: Callable[[Any, Tensor], Tensor] | None = None
    make_pipeline: Callable[..., Any] | None = None
    write_small: Callable[[Path], None] | None = None
    float32: tuple[str, ...] = ()
    decoder_baseline: str = "as diffusers has it"
    videos: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def drawn(transformer: nn.Module, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Float32 noise of several shapes on a model's device, the same each time."""
    generator = torch.Generator(transformer.device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=transformer.device) for shape in shapes]
