"""diffusers' own WanPipeline with NABLA, on the walk that ours takes, so that their latents compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

import wan
from nabla import NablaConfig
from wan.sampling.solvers import make_solver
from wan.sampling.texts import pad_rows

CONFIG = NablaConfig(threshold=0.4, dense_steps=1)
STEPS, SHIFT, GUIDANCE = 3, 5.0, 5.0
CPU = torch.device("cpu")


def inputs(pipe: wan.WanT2V) -> tuple[Tensor, list[Tensor]]:
    """Noise, and text states of both guidance branches."""
    generator, own = torch.Generator().manual_seed(0), pipe.transformer.config
    noise = torch.randn(1, own.in_channels, 2, 18, 22, generator=generator).to(pipe.device)
    texts = torch.randn(2, 7, own.text_dim, generator=generator).to(pipe.device)
    return noise, list(pad_rows(texts, pipe.text_length).split(1))


def own_latents(checkpoint: Path, lora: Path, device: torch.device = CPU) -> Tensor:
    pipe = wan.WanT2V.from_pretrained(checkpoint, CONFIG, device, lora=[str(lora)], compile=False)
    noise, texts = inputs(pipe)
    return pipe.sample(*texts, noise=noise, steps=STEPS, shift=SHIFT, guide_scale=GUIDANCE)


def latents_of_diffusers(
    checkpoint: Path,
    lora: Path,
    prepare: Callable[[WanTransformer3DModel], None] = lambda transformer: None,
    device: torch.device = CPU,
) -> Tensor:
    """As its users would: LoRA by its loader, NABLA, then what `prepare` does, such as offloading."""
    ours = wan.WanT2V.from_pretrained(checkpoint, "dense", device, compile=False)
    noise, (prompt, negative) = inputs(ours)
    wan.remove_attention(ours.transformer)
    solver = make_solver("unipc", STEPS, SHIFT, device)
    pipe = WanPipeline(None, None, ours.vae, solver, transformer=ours.transformer)
    pipe.set_progress_bar_config(disable=True)
    # The pipeline would put diffusers' own sigmas in place of the published ones.
    solver.set_timesteps = lambda *_, **__: None
    pipe.load_lora_weights(str(lora))
    wan.apply_attention(pipe.transformer, CONFIG)
    prepare(pipe.transformer)
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        latents=noise,
        height=8 * noise.shape[3],
        width=8 * noise.shape[4],
        num_frames=4 * noise.shape[2] - 3,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="latent",
    ).frames


def offload_blocks(transformer: WanTransformer3DModel, device: torch.device = CPU) -> None:
    """To the CPU, and to the device while they run: a block at a time, on a GPU the next one meanwhile."""
    prefetch = device.type == "cuda"
    transformer.enable_group_offload(
        device, CPU, offload_type="block_level", num_blocks_per_group=1, use_stream=prefetch
    )
