"""What benchmarks have to know of each family whose models they measure, in one frozen dataclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import Kandinsky5Transformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

from nabla import InputError
from wan.attention.spec import TransformerSpec
from wan.config.geometry import Geometry
from wan.config.settings import VideoSettings
from wan.memory.estimates import Weights, Workload
from wan.models.kandinsky import latents as kandinsky_latents
from wan.models.kandinsky import processor as kandinsky_processor
from wan.models.kandinsky import random_checkpoint as kandinsky
from wan.models.kandinsky import vae as kandinsky_vae
from wan.models.kandinsky.geometry import GEOMETRY as KANDINSKY_GEOMETRY
from wan.models.kandinsky.geometry import rope_scale
from wan.models.kandinsky.guidance import Guidance, rows_of
from wan.models.kandinsky.layout import TEXT_LENGTH
from wan.models.kandinsky.random_sizes import workload_for as kandinsky_workload
from wan.models.kandinsky.text import TOKENS_BEFORE
from wan.models.wan import latents as wan_latents
from wan.models.wan import processor as wan_processor
from wan.models.wan import random_checkpoint as wan
from wan.models.wan import random_sizes
from wan.models.wan import vae as wan_vae
from wan.models.wan.fused_gelu import fuse_gelu, unfuse_gelu
from wan.models.wan.geometry import GEOMETRY as WAN_GEOMETRY
from wan.sampling.loop import Conditions, Predict
from wan.sampling.texts import pad_rows

WAN_TEXT_ROWS = 512
# Tokens of a prompt of some sentences. diffusers' Kandinsky-5 sees no more rows, ours those of the longest as well.
KANDINSKY_TEXT_ROWS = 128
# Any will do: times do not depend on it.
TIMESTEP = 500


class Sampled(NamedTuple):
    """What the sampling loop is called with: noise (1, C, T, h, w) in float32, a model, and texts of both branches."""

    latents: Tensor
    predict: Predict
    conditions: Conditions


@dataclass(frozen=True)
class BenchmarkFamily:
    """A family of models with random weights.

    models: their sizes by name, with heads and width as `heads` and `dim`
    modes: those that measure them
    random_transformer: makes one, on its device
    as_diffusers, as_ours: turn it, in place and as often as one likes, into what is compared
    forward: a forward of a video, as the model is then
    sampled: the same for the sampling loop
    solver: that the family's pipeline runs
    all_blocks: of a transformer: what is streamed and quantised, those that run before the ones in `spec` first
    float32: modules of it by name that stay in that, and so are not quantised
    weigh_models, workload_for: what its models and a video take, for a plan of memory
    random_text_encoder: makes the larger one, in host memory
    text_blocks: of it
    encode: its states of token ids (B, L)
    text_tokens: that it sees at the most
    random_vae: makes one in float32, on its device
    prepare_decoder, decode: as the family's pipeline decodes
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
    forward: Callable[[Any, VideoSettings], Callable[[], Tensor]]
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
    float32: tuple[str, ...] = ()
    decoder_baseline: str = "as diffusers has it"
    videos: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def family_of(model: str, mode: str) -> BenchmarkFamily:
    """The family of a model, a key of `MODELS`; raises `InputError` if a mode does not measure it."""
    family = MODELS[model]
    if mode not in family.modes:
        able = ", ".join(name for name, other in MODELS.items() if mode in other.modes)
        raise InputError(f"mode {mode} does not measure {model}; use --model with one of {able}")
    return family


def wan_inputs(transformer: WanTransformer3DModel, video: VideoSettings, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, C, T, h, w), timesteps (B,) and text states (B, L, C)."""
    own = transformer.config
    shapes = (batch, own.in_channels, *video.latents_size), (batch, WAN_TEXT_ROWS, own.text_dim)
    latents, text = _drawn(transformer, *shapes)
    timestep = torch.full((batch,), TIMESTEP, device=transformer.device)
    return latents.to(transformer.dtype), timestep, text.to(transformer.dtype)


def _wan_forward(transformer: WanTransformer3DModel, video: VideoSettings) -> Callable[[], Tensor]:
    inputs = wan_inputs(transformer, video, 1)
    return lambda: transformer(*inputs, return_dict=False)[0]


def _wan_sampled(transformer: WanTransformer3DModel, video: VideoSettings) -> Sampled:
    latents, _, text = wan_inputs(transformer, video, 1)
    # Text of the other sign stands for the negative prompt's.
    return Sampled(latents.float(), partial(wan_processor.velocity_of, transformer), Conditions(text, -text))


def _kandinsky_forward(transformer: Kandinsky5Transformer3DModel, video: VideoSettings) -> Callable[[], Tensor]:
    latents, predict, conditions = _kandinsky_sampled(transformer, video)
    timestep = torch.full((1,), TIMESTEP, device=transformer.device)
    return partial(predict, latents, timestep, conditions.prompt)


def _kandinsky_sampled(transformer: Kandinsky5Transformer3DModel, video: VideoSettings) -> Sampled:
    own, scale = transformer.config, rope_scale(video.size)
    # Where our processors are in, texts are padded and the padding is masked; diffusers has no mask and pads nothing.
    mask = getattr(transformer, "text_mask", None)
    length = KANDINSKY_TEXT_ROWS if mask is None else TEXT_LENGTH
    text_shapes = (1, KANDINSKY_TEXT_ROWS, own.in_text_dim), (1, own.in_text_dim2)
    latents, text, pooled = _drawn(transformer, (1, own.out_visual_dim, *video.latents_size), *text_shapes)
    rows = rows_of(torch.tensor([KANDINSKY_TEXT_ROWS], device=transformer.device), length)

    def predict(latents: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        if mask is not None:
            mask.rows = guidance.rows
        return kandinsky_processor.velocity_of(
            transformer, latents, timestep, guidance.text, guidance.pooled, scale, guidance.first_frame
        )

    text, pooled = (x.to(transformer.dtype) for x in (pad_rows(text, length), pooled))
    return Sampled(latents, predict, Conditions(Guidance(text, rows, pooled), Guidance(-text, rows, -pooled)))


def _drawn(transformer: nn.Module, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Float32 noise of several shapes on a model's device, the same each time."""
    generator = torch.Generator(transformer.device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=transformer.device) for shape in shapes]


WAN = BenchmarkFamily(
    models=wan.MODELS,
    modes=frozenset({"mask", "attention", "forward", "pipeline", "training", "parallel", "cache", "memory"}),
    geometry=WAN_GEOMETRY,
    spec=wan_processor.TRANSFORMER,
    random_transformer=wan.random_transformer,
    as_diffusers=unfuse_gelu,
    as_ours=fuse_gelu,
    forward=_wan_forward,
    sampled=_wan_sampled,
    solver="unipc",
    all_blocks=wan_processor.TRANSFORMER.blocks_of,
    weigh_models=random_sizes.weigh_models,
    workload_for=random_sizes.workload_for,
    random_text_encoder=wan.random_text_encoder,
    text_blocks=lambda encoder: encoder.encoder.block,
    encode=lambda encoder, ids: encoder(ids, torch.ones_like(ids)).last_hidden_state,
    text_tokens=WAN_TEXT_ROWS,
    random_vae=wan.random_vae,
    prepare_decoder=wan_vae.speed_up_decoder,
    decode=wan_latents.decode,
)
KANDINSKY = BenchmarkFamily(
    models=kandinsky.MODELS,
    modes=frozenset({"mask", "attention", "forward", "pipeline", "memory"}),
    geometry=KANDINSKY_GEOMETRY,
    spec=kandinsky_processor.TRANSFORMER,
    random_transformer=kandinsky.random_transformer,
    as_diffusers=kandinsky_processor.remove_processors,
    as_ours=kandinsky_processor.install_processors,
    forward=_kandinsky_forward,
    sampled=_kandinsky_sampled,
    solver="euler",
    all_blocks=kandinsky_processor.all_blocks,
    float32=kandinsky_processor.FLOAT32_MODULES,
    weigh_models=kandinsky.weigh_models,
    workload_for=kandinsky_workload,
    random_text_encoder=kandinsky.random_text_encoder,
    text_blocks=lambda encoder: encoder.layers,
    encode=lambda encoder, ids: encoder(input_ids=ids, use_cache=False).last_hidden_state,
    text_tokens=TOKENS_BEFORE + TEXT_LENGTH,
    random_vae=kandinsky.random_vae,
    prepare_decoder=kandinsky_vae.prepare_decoder,
    decode=kandinsky_latents.decode,
    # Windows of frames are the published program's in both.
    decoder_baseline="diffusers' layers",
    videos={
        "kandinsky5-nano": ("256*256", 17),
        "kandinsky5-lite": ("768*512", 241),
        "kandinsky5-pro": ("1280*768", 121),
    },
)
MODELS = {model: family for family in (WAN, KANDINSKY) for model in family.models}
