"""What a calibration of attention takes: a block at each share, some layers' errors, and all of it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from nabla import InputError
from wan.attention.compile import compile_blocks
from wan.config.sampling_settings import SamplingSettings
from wan.config.settings import VideoSettings
from wan.memory.estimates import GIB
from wan.memory.peak import peak_gpu_bytes, peak_host_bytes
from wan.models.attention import apply_attention
from wan.tools.benchmark.models import MODELS
from wan.tools.benchmark.timing import Row, label, row_of, sparse_configs
from wan.tools.calibrate_attention.cost import Cost, Meter
from wan.tools.calibrate_attention.design import Design
from wan.tools.calibrate_attention.seats import Seats
from wan.tools.calibrate_attention.sensitivity import LayerErrors, measure_layers
from wan.tools.calibrate_attention.stretches import spans_of, walk_of

# Of a calibration as the program makes it by itself: stretches of the steps, and steps of its walks.
STRETCHES, WALK_STEPS = 4, 8
PROMPTS, CHECKED = 2, 1


@torch.no_grad()
def calibration_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """Shares are those of `--keep`; the last of the algorithms says by which parts blocks are chosen.

    Two layers are measured, that in the middle and the last; `all` is extrapolated, for two guidance branches.
    """
    if not args.keep:
        raise InputError("keep is empty; give shares of blocks to measure, such as --keep 0.1 0.2")
    family = MODELS[args.model]
    for video in videos:
        transformer = family.random_transformer(args.model, getattr(torch, args.dtype), device, layers=args.layers)
        family.as_ours(transformer)
        compile_blocks(family.spec.blocks_of(transformer))
        apply_attention(transformer, sparse_configs(args)[-1])
        forward = family.forward(transformer, video)
        with Seats(transformer, family.spec).taken() as seats:
            cost = Meter(seats, args.keep, device).measure(forward)
            for share in (1.0, *args.keep):
                what = f"{share:.0%} kept" if share < 1 else "dense"
                yield _row(f"{label(video)}: a block, {what}", cost.block(0, share))
            found: list[LayerErrors] = []
            layers, middle = sorted({cost.layers // 2, cost.layers - 1}), args.keep[len(args.keep) // 2]
            start = time.perf_counter()
            measure_layers(seats, args.keep, forward, layers, (middle,), cost.nbytes, found.append)
            yield _row(f"{label(video)}: errors of {len(found)} layers", 1000 * (time.perf_counter() - start))
        peak = {"host_gib": round(peak_host_bytes() / GIB, 1)}
        if device.type == "cuda":
            peak["peak_gib"] = round(peak_gpu_bytes(device) / GIB, 2)
        for exact in (False, True):
            how = "exact" if exact else "fast"
            yield _row(f"{label(video)}: all, {how}, {PROMPTS} + {CHECKED} prompts", _all(args, cost, exact)) | peak


def _all(args: argparse.Namespace, cost: Cost, exact: bool) -> float:
    """Milliseconds of a whole calibration of a guided run."""
    sampling = SamplingSettings(seed=0)
    spans = tuple(spans_of(sampling, None, 0, STRETCHES))
    design = Design(PROMPTS, CHECKED, spans, walk_of(sampling, None, spans, WALK_STEPS), tuple(args.keep))
    return 1000 * design.seconds(replace(cost, calls=2), exact)


def _row(what: str, milliseconds: float) -> Row:
    return row_of(what, [milliseconds])
