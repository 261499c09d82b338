"""Whole videos by a family's pipeline with random weights, within budgets of GPU memory and without any."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

from nabla import NablaConfig
from wan.config.settings import VideoSettings
from wan.memory.decoding import vae_dtype_of
from wan.memory.estimates import GIB
from wan.memory.peak import peak_gpu_bytes
from wan.memory.planner import MemoryPlan
from wan.models.attention import apply_attention
from wan.tools.benchmark.models import MODELS
from wan.tools.benchmark.placing import clean, placed_text_encoder, placed_transformer, plans_within
from wan.tools.benchmark.timing import Row, row_of, sparse_configs, synchronize

PROMPT = "Two cats box under a spotlight"


@torch.no_grad()
def run_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """For each video, all that the GPU has and each budget: `--steps` guided steps at the published guidance.

    The first video compiles and warms up, and is told as `first_s`.
    """
    for video in videos:
        for name, _, _, plan in plans_within(args, video, device):
            for config in ([] if args.no_dense else [NablaConfig()]) + sparse_configs(args):
                clean(device)
                what = f"{name}, {args.steps} steps, {config.algorithm}"
                yield _video_row(args, video, device, plan, config, what)


def _video_row(
    args: argparse.Namespace,
    video: VideoSettings,
    device: torch.device,
    plan: MemoryPlan,
    config: NablaConfig,
    name: str,
) -> Row:
    pipe, given = random_pipeline(args, video, device, plan, config)
    seconds = []
    for _ in range(1 + args.repeats):
        synchronize(args)
        start = time.perf_counter()
        pipe.generate(PROMPT, exact_size=True, **given)
        seconds.append(time.perf_counter() - start)
    stages = {f"{stage}_s": round(taken, 2) for stage, taken in pipe.seconds.items()}
    row = row_of(name, [1000 * taken for taken in seconds[1:]]) | {"first_s": round(seconds[0], 1)} | stages
    return row | ({"peak_gib": round(peak_gpu_bytes(device) / GIB, 2)} if device.type == "cuda" else {})


def random_pipeline(
    args: argparse.Namespace, video: VideoSettings, device: torch.device, plan: MemoryPlan, config: NablaConfig
) -> tuple[Any, dict[str, Any]]:
    """A family's pipeline with random weights where a plan has them, and what its videos are given beside a prompt."""
    family = MODELS[args.model]
    transformers = [placed_transformer(args, device, plan, seed) for seed in range(plan.experts)]
    apply_attention(transformers, config)
    vae = family.random_vae(args.model, device)
    family.prepare_decoder(vae, vae_dtype_of(None, getattr(torch, args.dtype), device.type))
    family.prepare_encoder(vae, torch.float32)
    text = placed_text_encoder(args, device, plan)
    pipe, given = family.make_pipeline(args.model, transformers, text, vae, device, plan, args.steps, video)
    pipe.plan = plan
    return pipe, given
