"""Wan's models for benchmarks, of every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nabla import InputError
from wan.config.settings import SamplingSettings, VideoSettings
from wan.memory.planner import MemoryPlan
from wan.models.family import Layout
from wan.models.wan import latents as wan_latents
from wan.models.wan import processor as wan_processor
from wan.models.wan import random_checkpoint as wan
from wan.models.wan import random_sizes
from wan.models.wan import vae as wan_vae
from wan.models.wan.family import WAN as FAMILY
from wan.models.wan.fused_gelu import fuse_gelu, unfuse_gelu
from wan.models.wan.geometry import GEOMETRY, GEOMETRY_5B
from wan.models.wan.kinds import KINDS
from wan.models.wan.text_image_to_video import token_timesteps
from wan.sampling.loop import Conditions
from wan.tools.benchmark.family import TIMESTEP, BenchmarkFamily, Sampled, drawn

TEXT_ROWS = 512
# Rows of a picture's states, where the model does not say.
PICTURE_ROWS = 257
# Behind the name of a model that may begin with a picture: that it does.
WITH_PICTURE = "-picture"


def wan_inputs(transformer: nn.Module, video: VideoSettings, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, C, T, h, w), timesteps (B,) and text states (B, L, C)."""
    own = transformer.config
    shapes = (batch, own.in_channels, *video.latents_size), (batch, TEXT_ROWS, own.text_dim)
    latents, text = drawn(transformer, *shapes)
    timestep = torch.full((batch,), TIMESTEP, device=transformer.device)
    return latents.to(transformer.dtype), timestep, text.to(transformer.dtype)


def given_inputs(transformer: nn.Module, video: VideoSettings) -> dict[str, Tensor]:
    """What else a transformer takes, by name: states of pictures, or control states, where it does."""
    own, given = transformer.config, {}
    if own.image_dim is not None:
        pictures, rows = (1, PICTURE_ROWS) if own.pos_embed_seq_len is None else (2, own.pos_embed_seq_len // 2)
        given["encoder_hidden_states_image"] = (pictures, rows, own.image_dim)
    if own.get("vace_layers"):
        given["control_hidden_states"] = (1, own.vace_in_channels, *video.latents_size)
    values = drawn(transformer, *given.values())
    return {name: value.to(transformer.dtype) for name, value in zip(given, values)}


def _forward(
    transformer: nn.Module, video: VideoSettings, batch: int = 1, with_picture: bool = False
) -> Callable[[], Tensor]:
    latents, timestep, text = wan_inputs(transformer, video, batch)
    if with_picture:
        timestep = token_timesteps(timestep, video.token_grid)
    given = given_inputs(transformer, video)
    if given and batch > 1:
        raise InputError(f"batch {batch} is measured of models that are given text alone; leave it out")
    return lambda: transformer(latents, timestep, text, return_dict=False, **given)[0]


def _sampled(transformer: nn.Module, video: VideoSettings, with_picture: bool = False) -> Sampled:
    latents, _, text = wan_inputs(transformer, video, 1)
    given, channels = given_inputs(transformer, video), transformer.config.out_channels
    # What is given lies beside the noise, where the transformer is given more than it makes.
    beside = latents[:, channels:]

    def predict(latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        if with_picture:
            timestep = token_timesteps(timestep, video.token_grid)
        seen = torch.cat((latents.to(beside), beside), dim=1)
        return wan_processor.velocity_of(transformer, seen, timestep, text, **given)

    # Text of the other sign stands for the negative prompt's.
    return Sampled(latents[:, :channels].float(), predict, Conditions(text, -text))


def _models_of(*kinds: str) -> dict[str, Any]:
    return {name: sizes for name, sizes in random_sizes.MODELS.items() if sizes.kind in kinds}


def _bare(make: Callable[..., Any]) -> Callable[..., Any]:
    """What makes a model by the name of one that begins with a picture."""

    def made(model: str, *args: Any, **options: Any) -> Any:
        return make(model.removesuffix(WITH_PICTURE), *args, **options)

    return made


def make_pipeline(
    model: str,
    transformers: Sequence[nn.Module],
    text_encoder: nn.Module,
    vae: nn.Module,
    device: torch.device,
    plan: MemoryPlan,
    steps: int,
    video: VideoSettings,
) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a kind with its published settings, and what its videos are made of beside a prompt."""
    sizes = random_sizes.MODELS[model.removesuffix(WITH_PICTURE)]
    kind = KINDS[sizes.kind]
    home = torch.device("cpu") if plan.in_turns else device
    tower = None if sizes.tower is None else wan.random_picture_tower(sizes.tower, device).to(home)
    pipe = FAMILY.load_pipeline(Layout(True, {}, kind.name, kind.boundary))(
        transformer=transformers[0],
        transformer_2=transformers[1] if len(transformers) > 1 else None,
        boundary=kind.boundary,
        vae=vae.to(home),
        text_encoder=text_encoder,
        image_encoder=tower,
        tokenizer=wan.small_tokenizer(sizes.vocabulary),
        device=device,
        text_device=torch.device("cpu") if plan.text == "cpu" else device,
        text_length=TEXT_ROWS,
        offload=plan.in_turns,
        sampling=SamplingSettings(**{**kind.defaults.get("sampling", {}), "steps": steps, "seed": 0}),
        video=video,
    )
    wanted = kind.inputs.required | ({"image"} if model.endswith(WITH_PICTURE) else set())
    grey = np.full((*video.size[::-1], 3), 127, np.uint8)
    return pipe, dict.fromkeys(sorted(wanted), grey)


WAN = BenchmarkFamily(
    models=_models_of("t2v"),
    modes=frozenset(
        {"mask", "attention", "forward", "pipeline", "training", "parallel", "cache", "memory", "run", "calibration"}
        | {"serve"}
    ),
    geometry=GEOMETRY,
    spec=wan_processor.TRANSFORMER,
    random_transformer=wan.random_transformer,
    as_diffusers=unfuse_gelu,
    as_ours=fuse_gelu,
    forward=_forward,
    sampled=_sampled,
    solver="unipc",
    all_blocks=wan_processor.blocks_of,
    weigh_models=random_sizes.weigh_models,
    workload_for=random_sizes.workload_for,
    others_of=random_sizes.others_of,
    random_text_encoder=wan.random_text_encoder,
    text_blocks=lambda encoder: encoder.encoder.block,
    encode=lambda encoder, ids: encoder(ids, torch.ones_like(ids)).last_hidden_state,
    text_tokens=TEXT_ROWS,
    random_vae=wan.random_vae,
    prepare_decoder=wan_vae.speed_up_decoder,
    decode=wan_latents.decode,
    prepare_encoder=wan_vae.speed_up_encoder,
    encode_video=wan_latents.encode,
    make_pipeline=make_pipeline,
    write_small=lambda folder: wan.write("nano", folder, torch.float32),
)
# Of the others, what trains, splits and caches them is that of the first.
WAN_GIVEN = replace(
    WAN,
    models=_models_of("i2v", "flf2v", "t2v-A14B", "i2v-A14B"),
    modes=frozenset({"mask", "attention", "forward", "pipeline", "memory", "run", "calibration"}),
    videos={name: ("64*48", 5) for name in random_sizes.MODELS if name.endswith("-nano")},
)
WAN_VACE = replace(
    WAN_GIVEN,
    models=_models_of("vace"),
    spec=wan_processor.VACE_TRANSFORMER,
    videos=WAN_GIVEN.videos | {"vace-1.3B": ("832*480", 81)},
)
WAN_5B = replace(
    WAN_GIVEN,
    models=_models_of("ti2v-5B"),
    geometry=GEOMETRY_5B,
    # Without a picture nothing is encoded, and all tokens have one timestep.
    workload_for=partial(random_sizes.workload_for, has_picture=False),
    videos={"ti2v-5B": ("1280*704", 121), "ti2v-5B-nano": ("64*64", 5)},
)
WAN_5B_PICTURE = replace(
    WAN_5B,
    models={name + WITH_PICTURE: sizes for name, sizes in WAN_5B.models.items()},
    random_transformer=_bare(wan.random_transformer),
    random_text_encoder=_bare(wan.random_text_encoder),
    random_vae=_bare(wan.random_vae),
    forward=partial(_forward, with_picture=True),
    sampled=partial(_sampled, with_picture=True),
    workload_for=random_sizes.workload_for,
    videos={name + WITH_PICTURE: video for name, video in WAN_5B.videos.items()},
)
WAN_FAMILIES = (WAN, WAN_GIVEN, WAN_VACE, WAN_5B, WAN_5B_PICTURE)
