"""Benchmark of step caches: what they cost and save of a step, and what they change about videos."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from nabla import InputError, NablaConfig
from wan.attention.compile import compile_blocks
from wan.caches.applied import reuse_of
from wan.caches.apply import apply_cache, remove_cache
from wan.caches.calibration import calibrated
from wan.config.cache_settings import KINDS, CacheSettings
from wan.config.model_settings import ModelSettings
from wan.config.settings import Settings, VideoSettings, changed
from wan.models.attention import apply_attention
from wan.models.wan.fused_gelu import fuse_gelu
from wan.models.wan.pipeline import WanT2V
from wan.models.wan.processor import TRANSFORMER
from wan.models.wan.random_checkpoint import random_transformer
from wan.quantize.quantizer import quantize_layers
from wan.run.ratios import measured_otherwise
from wan.shapes.sentences import of_shapes
from wan.tools.benchmark.timing import Row, label, peak_memory, reset_peak, row_of, sparse_configs
from wan.tools.benchmark.transformer import step_row
from wan.tools.quality import psnr

SEED = 1000
# JSON has no infinity.
MOST_PSNR = 100.0


def cache_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """With a checkpoint whole videos, their likeness to the uncached ones; else steps of random weights."""
    yield from step_rows(args, videos, device) if args.ckpt_dir is None else video_rows(args, device)


@torch.no_grad()
def step_rows(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """A guided step without a cache, with one that reuses nothing, and one that is reused."""
    transformer = random_transformer(args.model, getattr(torch, args.dtype), device, layers=args.layers)
    fuse_gelu(transformer)
    if args.fp8:
        print(quantize_layers(transformer, transformer.blocks, "fp8", device))
    compile_blocks(transformer.blocks)
    for video in videos:
        for config in [*([] if args.no_dense else [NablaConfig()]), *sparse_configs(args)]:
            apply_attention(transformer, config)
            name = f"{label(video)}: a step, {config.algorithm}{' fp8' if args.fp8 else ''}"
            plain = cached_step_row(args, name, transformer, video)
            yield plain
            for kind in KINDS:
                for what, settings in extremes(kind).items():
                    row = cached_step_row(args, f"{name}, {kind}, {what}", transformer, video, settings)
                    yield row | {"of_uncached": round(row["ms"] / plain["ms"], 4)}


def extremes(kind: str) -> dict[str, CacheSettings]:
    """A cache that keeps but never reuses, and one that reuses from the second step on, of TaylorSeer but the third."""
    if kind == "taylorseer":
        return {"nothing reused": CacheSettings(kind, warmup=1), "reused": CacheSettings(kind, warmup=0, interval=1000)}
    # No change is below a threshold of 0.
    never = CacheSettings(kind, 0, warmup=0, ratios=(2.0,) if kind == "mag" else None)
    # Ratios of 1 predict no error.
    always = replace(never, threshold=1e9, max_skips=1000, ratios=never.ratios and (1.0,))
    return {"nothing reused": never, "reused": always}


def cached_step_row(
    args: argparse.Namespace,
    what: str,
    transformer: WanTransformer3DModel,
    video: VideoSettings,
    settings: CacheSettings | None = None,
) -> Row:
    """`step_row` with a cache."""
    reset_peak(args)
    if settings is None:
        return step_row(args, what, transformer, video)[0] | peak_memory(args)
    cache = apply_cache(transformer, settings, TRANSFORMER)
    cache.begin(args.steps, dense_steps=0)
    row, _ = step_row(args, what, transformer, video, in_branch=cache.branch)
    row |= {"reused": f"{cache.reused} of {cache.forwards}"} | peak_memory(args)
    remove_cache(transformer)
    return row


def video_rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Sampling of whole videos without a cache, then with each, in the checkpoint's own settings where none are given.

    MagCache's ratios are measured first, on other sentences and seeds, for caches that name no file of them. A cache of
    threshold 0 shows what it changes that guidance branches run apart, which on a GPU may else be one batch.
    """
    # Wrong ones are found before anything is loaded.
    list(parse_caches(args.cache, [1.0]))
    pipe = open_pipeline(args, device)
    prompts = args.prompt or [sentence for sentence, _ in of_shapes(args.count, SEED)]
    # Other sentences and noise than those that are compared, so that ratios are not fitted to them.
    with calibrated(pipe.transformers, TRANSFORMER) as calibration:
        others = [sentence for sentence, _ in of_shapes(2, SEED - 2)]
        sample_videos(pipe, others, SEED - 2)
        ratios = calibration.ratios()
    # Both ways of guidance are warm then.
    sample_videos(pipe, others[:1], SEED - 2)
    what = f"{label(pipe.video)}: {pipe.sampling.steps} steps, {pipe.transformer.nabla.config.algorithm}"
    exact, times = sample_videos(pipe, prompts, SEED)
    plain = row_of(what, times)
    yield plain
    attention = pipe.transformer.nabla.config
    run = Settings(ModelSettings(args.ckpt_dir, fp8=args.fp8, attention=attention), prompts[0], pipe.sampling)
    for settings in parse_caches(args.cache, ratios):
        if line := measured_otherwise(replace(run, model=replace(run.model, cache=settings))):
            print(f"warning: {line}", file=sys.stderr)
        for one in pipe.transformers:
            apply_cache(one, settings, TRANSFORMER)
        reset_peak(args)
        cached, times = sample_videos(pipe, prompts, SEED)
        # The count is that of the last video.
        row = row_of(f"{what}, {settings.short}", times)
        forwards, reused = reuse_of(pipe.transformers)
        row |= {"speedup": round(plain["ms"] / row["ms"], 2), "reused": f"{reused} of {forwards}"}
        likeness = [min(psnr(one, other), MOST_PSNR) for one, other in zip(cached, exact)]
        row |= {"psnr": round(statistics.mean(likeness), 2), "least_psnr": round(min(likeness), 2)}
        yield row | peak_memory(args)
    for one in pipe.transformers:
        remove_cache(one)


def open_pipeline(args: argparse.Namespace, device: torch.device) -> WanT2V:
    """A checkpoint without a cache, with what the flags say of its videos."""
    pipe = WanT2V.from_pretrained(
        args.ckpt_dir,
        args.sparse_algo,
        device,
        getattr(torch, args.dtype),
        compile=args.compile,
        fp8=args.fp8,
        cache="none",
    )
    size, frame_num = (given and given[0] for given in (args.size, args.frame_num))
    pipe.video = changed(pipe.video, size=size, frame_num=frame_num)
    pipe.sampling = changed(pipe.sampling, steps=args.steps)
    return pipe


def parse_caches(caches: list[str], ratios: list[float]) -> Iterator[CacheSettings]:
    """What `--cache` names, `mag` with the ratios measured unless it names a file of its own."""
    for given in caches:
        kind, *others = given.split(":")
        own = {} if kind != "mag" or len(others) > 1 else {"ratios": ratios}
        settings = CacheSettings.parse(given, **own)
        if settings is None:
            raise InputError(f"cache {given}: the first row is without one already; leave it out")
        yield settings


def sample_videos(pipe: WanT2V, prompts: list[str], seed: int) -> tuple[list[Tensor], list[float]]:
    """A video a prompt, (frames, H, W, 3) uint8, and the milliseconds that each took to sample."""
    videos, times = [], []
    for number, prompt in enumerate(prompts):
        videos.append(torch.from_numpy(pipe.generate(prompt, seed=seed + number)))
        times.append(1000 * pipe.seconds["sampling"])
    return videos, times
