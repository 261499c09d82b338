"""A pipeline of VACE of random weights and sizes as small as they may be, for the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanVACETransformer3DModel
from torch import Tensor, nn

from wan import WanVACE
from wan.config.settings import SamplingSettings, VideoSettings
from wan.models.wan.condition import Condition
from wan.parallel.distributed import DistributedContext

# Of tokens (3, 6, 5) with a reference: no tile divides them, nor do two processes.
SIZE, FRAMES, REFERENCES = (80, 96), 5, 1
LATENTS = (REFERENCES + 2, 12, 10)


def transformer(**changes: Any) -> WanVACETransformer3DModel:
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=3)
    own = {"in_channels": 16, "out_channels": 16, "vace_layers": [0, 2], **sizes, **changes}
    return WanVACETransformer3DModel(**own).requires_grad_(False).eval()


def pipeline(processes: DistributedContext | None = None, steps: int = 3, **changes: Any) -> WanVACE:
    """On all processes, of which the one that leads has what encodes; or on this one alone."""
    model = transformer(**changes)
    vae: nn.Module | None = AutoencoderKLWan(base_dim=4).requires_grad_(False).eval()
    if processes is not None and not processes.is_leader:
        vae = None
    cpu, form = torch.device("cpu"), (SamplingSettings(steps=steps), VideoSettings(SIZE, FRAMES))
    return WanVACE(model, vae, None, None, cpu, cpu, 512, False, *form, processes=processes)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def given() -> dict[str, Any]:
    """A source of more frames and of another form than the video, its mask, and a reference."""
    return {
        "src_video": drawn(7, 110, 90, 3),
        "src_mask": drawn(7, 110, 90, 3, seed=1),
        "src_ref_images": [drawn(50, 70, 3, seed=2)],
    }


def sample(pipe: WanVACE, condition: Condition, batch: int = 1) -> Tensor:
    """Latents (batch, 16, T, h, w), guided, always of the same noise and texts."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(2, 7, 32, generator=generator).split(1)
    noise = torch.randn(1, 16, *LATENTS, generator=generator).expand(batch, -1, -1, -1, -1)
    return pipe.sample(*texts, noise=noise, conditions=condition)
