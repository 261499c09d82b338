"""Benchmarks of the transformer, the decoder and whole videos, with random weights."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nabla import NablaConfig
from wan.attention.compile import compile_blocks
from wan.config.settings import VideoSettings
from wan.models.attention import apply_attention, remove_attention
from wan.quantize.quantizer import quantize_layers
from wan.sampling.loop import denoise
from wan.sampling.solvers import make_solver
from wan.tools.benchmark.models import MODELS
from wan.tools.benchmark.timing import (
    Row,
    dense_kernels,
    label,
    peak_memory,
    reset_peak,
    row_of,
    sparse_configs,
    synchronize,
    timed,
)

PUBLISHED_STEPS = 50


def transformers(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, bool, nn.Module]]:
    """The model as benchmarks use it: dense as diffusers has it, then ours; in args.dtype, then in float8 if asked for.

    Yields a suffix for the rows' names, whether it is the dense one, and the model with compiled blocks.
    """
    family = MODELS[args.model]
    transformer = family.random_transformer(args.model, getattr(torch, args.dtype), device, layers=args.layers)
    blocks = family.spec.blocks_of(transformer)
    for kind in ["", " fp8"] if args.fp8 else [""]:
        if kind:
            # In place, so after all rows of the exact weights.
            print(quantize_layers(transformer, blocks, "fp8", device, family.float32))
        for is_dense in [False] if args.no_dense else [True, False]:
            torch._dynamo.reset()
            remove_attention(transformer)
            for block in blocks:
                # The class's own forward again, before the other one's parts are compiled.
                block.__dict__.pop("forward", None)
            (family.as_diffusers if is_dense else family.as_ours)(transformer)
            compile_blocks(blocks)
            yield kind, is_dense, transformer


@torch.no_grad()
def forward_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """The whole transformer: dense as diffusers does it, then sparse, speed-ups against dense of the same precision."""
    exact: dict[str, Tensor] = {}
    dense: dict[str, float] = {}
    for kind, is_dense, transformer in transformers(args, device):
        for video, config in itertools.product(videos, [NablaConfig()] if is_dense else sparse_configs(args)):
            apply_attention(transformer, config)
            kernel, context = next(iter(dense_kernels(device).items())) if is_dense else ("", nullcontext)
            name = f"dense, {kernel}" if is_dense else config.algorithm
            forward = MODELS[args.model].forward(transformer, video)
            with context():
                row = forward_row(args, f"{label(video)}: {name}{kind}", forward, exact, kind)
            if is_dense:
                dense[label(video) + kind] = row["ms"]
            elif not args.no_dense:
                row["speedup"] = round(dense[label(video) + kind] / row["ms"], 2)
            yield row
            for batch in args.batch:
                forward = MODELS[args.model].forward(transformer, video, batch)
                with context():
                    several = forward_row(args, f"{label(video)}, {batch} at once: {name}{kind}", forward, exact, kind)
                yield several | {"times_one_by_one": round(several["ms"] / (batch * row["ms"]), 3)}


def forward_row(
    args: argparse.Namespace, what: str, forward: Callable[[], Tensor], exact: dict[str, Tensor], kind: str
) -> Row:
    start = time.perf_counter()
    # This one compiles. On the host, since outputs of all rows are kept to compare float8 with.
    out = forward().cpu()
    first = round(time.perf_counter() - start, 1)
    # Compiled from here on would be recompiled, which no row should be.
    graphs = compiled_graphs()
    reset_peak(args)
    row = timed(what, forward, args, warm=False, first_s=first)
    row |= {"recompiles": compiled_graphs() - graphs} | peak_memory(args)
    before = exact.setdefault(what.removesuffix(kind), out)
    if kind:
        row["error_of_fp8"] = round(((out - before).float().norm() / before.float().norm()).item(), 4)
    return row


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
def pipeline_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """Guided steps and the decoder; `video_s` is 50 such steps and a decode, extrapolated, without the text encoder."""
    for video in videos:
        decoding = list(decode_rows(args, video, device))
        yield from decoding
        for kind, is_dense, transformer in transformers(args, device):
            refreshed = [replace(config, mask_refresh=n) for config in sparse_configs(args) for n in args.mask_refresh]
            last: dict[str, Tensor] = {}
            for config in [NablaConfig()] if is_dense else [*sparse_configs(args), *refreshed]:
                apply_attention(transformer, config)
                row, latents = step_row(args, f"{label(video)}: a step, {config.algorithm}{kind}", transformer, video)
                # The last row of decoding is the decoder as the pipeline runs it.
                row["video_s"] = round((PUBLISHED_STEPS * row["ms"] + decoding[-1]["ms"]) / 1000)
                if config.mask_refresh > 1:
                    plain = last[config.algorithm]
                    row["what"] += f", masks kept for {config.mask_refresh} steps"
                    row["change_of_latents"] = round(((latents - plain).norm() / plain.norm()).item(), 4)
                last.setdefault(config.algorithm, latents)
                yield row


def step_row(
    args: argparse.Namespace, what: str, transformer: nn.Module, video: VideoSettings, **loop: Any
) -> tuple[Row, Tensor]:
    """Guided steps after the first, in a loop with what else `denoise` takes."""
    family = MODELS[args.model]
    latents, predict, conditions = family.sampled(transformer, video)
    solver, starts = make_solver(family.solver, args.steps, 5.0, args.device), []
    steps = transformer.nabla.steps

    def before_step(step: int) -> None:
        synchronize(args)
        starts.append(time.perf_counter())
        steps.set_step(step, args.steps)

    latents = denoise(predict, latents, conditions, solver, 5.0, before_step=before_step, **loop)
    # The end of the last step, as the start of one more.
    before_step(args.steps)
    seconds = [after - before for before, after in itertools.pairwise(starts)]
    # The first compiles, unless it is the only one.
    later = [1000 * taken for taken in seconds[1:] or seconds]
    return row_of(what, later) | {"first_s": round(seconds[0], 1)}, latents


def decode_rows(args: argparse.Namespace, video: VideoSettings, device: torch.device) -> Iterator[Row]:
    """The decoder as diffusers has it, in float32, and as the pipeline runs it."""
    family = MODELS[args.model]
    vae = family.random_vae(args.model, device)
    latents = random_latents(vae, video, device)
    exact = family.decode(vae, latents)
    for dtype in (torch.float32, torch.float16) if device.type == "cuda" else (torch.float32,):
        # On a GPU float32 is the baseline and float16 what the pipeline runs, on a CPU float32 is.
        name = family.decoder_baseline if dtype == torch.float32 and device.type == "cuda" else "fast"
        if name == "fast":
            family.prepare_decoder(vae, dtype)
        start = time.perf_counter()
        error = (family.decode(vae, latents) - exact).square().mean().item()
        first = round(time.perf_counter() - start, 2)
        reset_peak(args)
        what = f"{label(video)}: decode, {name}, {str(dtype).removeprefix('torch.')}"
        row = timed(what, lambda: family.decode(vae, latents), args, warm=False, first_s=first)
        yield row | peak_memory(args) | {"psnr": round(10 * math.log10(4 / max(error, 1e-12)), 1)}


def random_latents(vae: Any, video: VideoSettings, device: torch.device) -> Tensor:
    """(1, C, T, h, w) for a decoder."""
    # Of diffusers' classes each has a name of its own for it.
    channels = vae.config.get("z_dim") or vae.config.latent_channels
    return torch.randn(1, channels, *video.latents_size, device=device)
