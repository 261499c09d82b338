"""Benchmark of step caches: what they cost and save of a step, and what they change about videos."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from diffusers import TaylorSeerCacheConfig, WanTransformer3DModel
from torch import Tensor

from nabla import InputError, NablaConfig
from wan.attention import apply_attention, compile_blocks
from wan.benchmark.timing import Row, configs, label, peak, reset_peak, row_of
from wan.benchmark.transformer import step_row
from wan.cache_settings import THRESHOLDS, CacheSettings
from wan.config import VideoSettings, changed
from wan.fp8 import apply_fp8
from wan.fused_gelu import fuse_gelu
from wan.pipeline import WanT2V
from wan.quality import psnr
from wan.random_checkpoint import random_transformer
from wan.step_cache import StepCache, apply_cache, calibrated, remove_cache
from wan.training.sentences import of_shapes

SEED = 1000
# Compared, and not offered.
TAYLORSEER = "taylorseer"
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
        print(apply_fp8(transformer).describe())
    compile_blocks(transformer)
    for video in videos:
        for config in [*([] if args.no_dense else [NablaConfig()]), *configs(args)]:
            apply_attention(transformer, config)
            name = f"{label(video)}: a step, {config.algorithm}{' fp8' if args.fp8 else ''}"
            plain = step_of(args, name, transformer, video)
            yield plain
            for kind in THRESHOLDS:
                for what, settings in extremes(kind).items():
                    row = step_of(args, f"{name}, {kind}, {what}", transformer, video, settings)
                    yield row | {"of_uncached": round(row["ms"] / plain["ms"], 4)}


def extremes(kind: str) -> dict[str, CacheSettings]:
    """A cache that keeps but never reuses, and one that reuses from the second step on."""
    never = CacheSettings(kind, 0, warmup=0, ratios=(2.0,) if kind == "mag" else None)
    # Ratios of 1 predict no error.
    always = replace(never, threshold=1e9, max_skips=1000, ratios=never.ratios and (1.0,))
    return {"nothing reused": never, "reused": always}


def step_of(
    args: argparse.Namespace,
    what: str,
    transformer: WanTransformer3DModel,
    video: VideoSettings,
    settings: CacheSettings | None = None,
) -> Row:
    """`step_row` with a cache."""
    reset_peak(args)
    if settings is None:
        return step_row(args, what, transformer, video)[0] | peak(args)
    cache = apply_cache(transformer, settings)
    cache.begin(args.steps, dense_steps=0)
    row, _ = step_row(args, what, transformer, video, in_branch=cache.branch)
    row |= {"reused": f"{cache.reused} of {cache.forwards}"} | peak(args)
    remove_cache(transformer)
    return row


def video_rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Sampling of whole videos without a cache, then with each, in the checkpoint's own settings where none are given.

    MagCache's ratios are measured first, on other sentences and seeds, unless a cache names a file of them. A cache of
    threshold 0 shows what it changes that guidance branches run apart, which on a GPU may else be one batch.
    """
    # Wrong ones are found before anything is loaded.
    intervals = [taylor_interval(given) for given in args.cache if given.startswith(TAYLORSEER)]
    caches = [given for given in args.cache if not given.startswith(TAYLORSEER)]
    list(asked(caches, [1.0]))
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
    prompts = args.prompt or [sentence for sentence, _ in of_shapes(args.count, SEED)]
    with calibrated(pipe.transformer) as calibration:
        others = [sentence for sentence, _ in of_shapes(2, SEED - 2)]
        sampled(pipe, others, SEED - 2)
        ratios = calibration.ratios()
    # Both ways of guidance are warm then.
    sampled(pipe, others[:1], SEED - 2)
    what = f"{label(pipe.video)}: {pipe.sampling.steps} steps, {pipe.transformer.nabla.config.algorithm}"
    exact, times = sampled(pipe, prompts, SEED)
    plain = row_of(what, times)
    yield plain
    compared = [(f"{one.kind}:{one.threshold:g}", partial(apply_cache, settings=one)) for one in asked(caches, ratios)]
    compared += [(f"{TAYLORSEER}:{one}", partial(apply_taylorseer, interval=one)) for one in intervals]
    for name, apply in compared:
        cache = apply(pipe.transformer)
        reset_peak(args)
        cached, times = sampled(pipe, prompts, SEED)
        # The count is that of the last video.
        row = row_of(f"{what}, {name}", times)
        row |= {"speedup": round(plain["ms"] / row["ms"], 2), "reused": f"{cache.reused} of {cache.forwards}"}
        likeness = [min(psnr(one, other), MOST_PSNR) for one, other in zip(cached, exact)]
        yield row | {"psnr": round(statistics.mean(likeness), 2), "least_psnr": round(min(likeness), 2)} | peak(args)
    remove_cache(pipe.transformer)


class TaylorSeer(StepCache):
    """diffusers' TaylorSeer in its light form: between full forwards the last layer's output goes on along a line.

    To be compared with what can be chosen, after as many first steps in full; for one process.
    """

    def __init__(self, transformer: WanTransformer3DModel, interval: int):
        super().__init__(transformer, CacheSettings("first_block"))
        self.interval = interval

    def _prepare(self, steps: int, first: int) -> None:
        self.first = first
        if self.transformer.is_cache_enabled:
            self.transformer.disable_cache()
        self.transformer.enable_cache(
            TaylorSeerCacheConfig(
                cache_interval=self.interval,
                disable_cache_before_step=first,
                taylor_factors_dtype=torch.float32,
                use_lite_mode=True,
            )
        )

    @contextmanager
    def branch(self, name: str, step: int) -> Iterator[None]:
        with self.transformer.cache_context(name, step_index=step):
            yield
        self.forwards += 1
        self.reused += step >= self.first and (step - self.first - 1) % self.interval != 0


def apply_taylorseer(transformer: WanTransformer3DModel, interval: int) -> TaylorSeer:
    remove_cache(transformer)
    transformer.step_cache = TaylorSeer(transformer, interval)
    return transformer.step_cache


def taylor_interval(given: str) -> int:
    """The steps from one full forward to the next of `taylorseer:INTERVAL`."""
    interval = given.partition(":")[2]
    if not interval.isdecimal() or int(interval) < 2:
        raise InputError(f"cache {given}: the interval is not a whole number of steps from 2; write {TAYLORSEER}:3")
    return int(interval)


def asked(caches: list[str], ratios: list[float]) -> Iterator[CacheSettings]:
    """What `--cache` names, `mag` with the ratios measured unless it names a file of its own."""
    for given in caches:
        kind, *others = given.split(":")
        own = {} if kind != "mag" or len(others) > 1 else {"ratios": ratios}
        settings = CacheSettings.parse(given, **own)
        if settings is None:
            raise InputError(f"cache {given}: the first row is without one already; leave it out")
        yield settings


def sampled(pipe: WanT2V, prompts: list[str], seed: int) -> tuple[list[Tensor], list[float]]:
    """A video a prompt, (frames, H, W, 3) uint8, and the milliseconds that each took to sample."""
    videos, times = [], []
    for number, prompt in enumerate(prompts):
        videos.append(torch.from_numpy(pipe.generate(prompt, seed=seed + number)))
        times.append(1000 * pipe.seconds["sampling"])
    return videos, times
