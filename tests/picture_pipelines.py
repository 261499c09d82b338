"""Pipelines of Wan's videos from pictures, of random weights and sizes as small as they may be, for the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from wan.config.settings import SamplingSettings, VideoSettings
from wan.models.wan.condition import Condition
from wan.models.wan.image_to_video import WanI2V
from wan.models.wan.pipeline import WanT2V
from wan.models.wan.text_image_to_video import WanTI2V
from wan.parallel.distributed import DistributedContext

SIZE, FRAMES = (32, 48), 5
LATENTS = (2, 6, 4)
# Of a picture, by the encoder below.
TOKENS, WIDTH = 5, 24
_STATES = {"image_dim": WIDTH, "added_kv_proj_dim": 24}
# The class of each kind, and what its transformer has beyond a text-to-video one.
KINDS: dict[str, tuple[type[WanT2V], dict[str, Any]]] = {
    "i2v": (WanI2V, {"in_channels": 36, **_STATES}),
    "flf2v": (WanI2V, {"in_channels": 36, **_STATES, "pos_embed_seq_len": 2 * TOKENS}),
    "i2v-A14B": (WanI2V, {"in_channels": 36}),
    "ti2v-5B": (WanTI2V, {}),
}


def transformer(kind: str, seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2)
    own = {"in_channels": 16, "out_channels": 16, **sizes, **KINDS[kind][1]}
    return WanTransformer3DModel(**own).requires_grad_(False).eval()


def pipeline(kind: str, text_length: int = 512, processes: DistributedContext | None = None) -> Any:
    """On all processes, of which the one that leads has what encodes; or on this one alone. Two experts share a VAE."""
    models = transformer(kind), transformer(kind, seed=1) if kind.endswith("A14B") else None
    torch.manual_seed(0)
    vae: nn.Module | None = AutoencoderKLWan(base_dim=4).requires_grad_(False).eval()
    sizes = dict(hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
    tower: nn.Module | None = CLIPVisionModel(CLIPVisionConfig(image_size=28, **sizes)).requires_grad_(False).eval()
    if processes is not None and not processes.is_leader:
        vae = tower = None
    cpu, form = torch.device("cpu"), (SamplingSettings(steps=3), VideoSettings(SIZE, FRAMES))
    last = {"transformer_2": models[1], "boundary": 0.9 if models[1] else None, "image_encoder": tower}
    return KINDS[kind][0](models[0], vae, None, None, cpu, cpu, text_length, False, *form, processes=processes, **last)


def picture(width: int = 32, height: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def given_to(kind: str) -> dict[str, np.ndarray]:
    """The pictures that a kind takes."""
    return {"image": picture()} | ({"last_image": picture(40, 30, seed=1)} if kind == "flf2v" else {})


def sample(pipe: WanT2V, condition: Condition | None, size: tuple[int, int, int] = LATENTS, batch: int = 1) -> Tensor:
    """Latents (batch, 16, *size), guided, always of the same noise and texts."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(2, 7, 32, generator=generator).split(1)
    noise = torch.randn(batch, 16, *size, generator=generator)
    return pipe.sample(*texts, noise=noise, conditions=condition)
