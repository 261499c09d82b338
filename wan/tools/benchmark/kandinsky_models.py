"""Kandinsky-5's models for benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers import Kandinsky5Transformer3DModel
from torch import Tensor

from nabla import InputError
from wan.config.settings import VideoSettings
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
from wan.sampling.loop import Conditions
from wan.sampling.texts import pad_rows
from wan.tools.benchmark.family import TIMESTEP, BenchmarkFamily, Sampled, drawn

# Tokens of a prompt of some sentences. diffusers' Kandinsky-5 sees no more rows, ours those of the longest as well.
KANDINSKY_TEXT_ROWS = 128


def _kandinsky_forward(
    transformer: Kandinsky5Transformer3DModel, video: VideoSettings, batch: int = 1
) -> Callable[[], Tensor]:
    if batch > 1:
        raise InputError(f"batch {batch} is measured of Wan alone; leave it out")
    latents, predict, conditions = _kandinsky_sampled(transformer, video)
    timestep = torch.full((1,), TIMESTEP, device=transformer.device)
    return partial(predict, latents, timestep, conditions.prompt)


def _kandinsky_sampled(transformer: Kandinsky5Transformer3DModel, video: VideoSettings) -> Sampled:
    own, scale = transformer.config, rope_scale(video.size)
    # Where our processors are in, texts are padded and the padding is masked; diffusers has no mask and pads nothing.
    mask = getattr(transformer, "text_mask", None)
    length = KANDINSKY_TEXT_ROWS if mask is None else TEXT_LENGTH
    text_shapes = (1, KANDINSKY_TEXT_ROWS, own.in_text_dim), (1, own.in_text_dim2)
    latents, text, pooled = drawn(transformer, (1, own.out_visual_dim, *video.latents_size), *text_shapes)
    rows = rows_of(torch.tensor([KANDINSKY_TEXT_ROWS], device=transformer.device), length)

    def predict(latents: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        if mask is not None:
            mask.rows = guidance.rows
        return kandinsky_processor.velocity_of(
            transformer, latents, timestep, guidance.text, guidance.pooled, scale, guidance.first_frame
        )

    text, pooled = (x.to(transformer.dtype) for x in (pad_rows(text, length), pooled))
    return Sampled(latents, predict, Conditions(Guidance(text, rows, pooled), Guidance(-text, rows, -pooled)))


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
