"""Sparse attention under diffusers' own context parallelism, alone and in its whole pipeline, against one process."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers_pipeline
import torch
import weight_files
from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.hooks import apply_context_parallel
from torch.distributed.device_mesh import init_device_mesh

import wan
from nabla import NablaConfig
from wan.parallel.distributed import DistributedContext


@torch.no_grad()
def errors(distributed: DistributedContext) -> Iterator[float]:
    """The greatest error of an output, with sparse attention applied before parallelism and after it."""
    for applied_first in (True, False):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=24, text_dim=16, ffn_dim=64, num_layers=2
        ).eval()
        inputs = torch.randn(1, 16, 4, 32, 32), torch.tensor([500]), torch.randn(1, 5, 16)
        config = NablaConfig(threshold=0.4)
        wan.apply_attention(transformer, config)
        exact = transformer(*inputs, return_dict=False)[0]
        if not applied_first:
            wan.remove_attention(transformer)
        enable(transformer, distributed)
        if not applied_first:
            wan.apply_attention(transformer, config)
        yield (transformer(*inputs, return_dict=False)[0] - exact).abs().max().item()


def error_of_pipeline(distributed: DistributedContext, checkpoint: Path) -> float:
    """Of the latents of diffusers' pipeline with a LoRA, split over processes and its blocks offloaded."""

    def split_and_offload(transformer: WanTransformer3DModel) -> None:
        enable(transformer, distributed)
        diffusers_pipeline.offload_blocks(transformer, device)

    device = distributed.device
    with tempfile.TemporaryDirectory() as folder:
        factors = weight_files.draw_factors(wan.WanT2V.from_pretrained(checkpoint, "dense").transformer)
        lora = weight_files.write_lora(Path(folder) / "style.safetensors", factors, "diffusers")
        exact = diffusers_pipeline.own_latents(checkpoint, lora, device)
        latents = diffusers_pipeline.latents_of_diffusers(checkpoint, lora, split_and_offload, device)
    return ((latents - exact).norm() / exact.norm()).item()


def enable(transformer: WanTransformer3DModel, distributed: DistributedContext) -> None:
    """`transformer.enable_parallelism`, and what it does on a CPU, where it fails at counting devices."""
    config = ContextParallelConfig(ulysses_degree=distributed.world_size)
    if distributed.device.type == "cuda":
        transformer.enable_parallelism(config=config)
        return
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    config.setup(distributed.rank, distributed.world_size, torch.device("cpu"), mesh)
    parallel = type("ParallelConfig", (), {"context_parallel_config": config})
    for block in transformer.blocks:
        block.attn1.processor._parallel_config = parallel
    apply_context_parallel(transformer, config, transformer._cp_plan)
