"""Runs within a budget of GPU memory beside the one without: time and real peak of each stage, with random weights.

Torch's memory is limited to each budget, so that a run that exceeded it would fail; its row then says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from nabla import NablaConfig
from wan.config.settings import VideoSettings
from wan.memory.decoding import vae_dtype_of
from wan.memory.estimates import GIB
from wan.memory.peak import peak_gpu_bytes
from wan.memory.placement import Experts, experts_on_device, on_device
from wan.memory.planner import MemoryPlan
from wan.models.attention import apply_attention
from wan.tools.benchmark.models import MODELS
from wan.tools.benchmark.placing import clean, placed_text_encoder, placed_transformer, plans_within
from wan.tools.benchmark.timing import Row, row_of, sparse_configs, synchronize, timed
from wan.tools.benchmark.transformer import random_latents

PROBE = 2**30


@torch.no_grad()
def memory_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """For each video: all that the GPU has, then each budget. Rows of a forward compare with the first one."""
    if device.type == "cuda":
        yield _link_row(args, device)
    config = sparse_configs(args)[0]
    for video in videos:
        free: dict[str, float] = {}
        for name, given, budget, plan in plans_within(args, video, device):
            for stage, measure in _stages(plan, config).items():
                for row in _stage_rows(args, device, f"{name}, {stage}", partial(measure, args, video, device, plan)):
                    if plan.in_turns:
                        # Else models that stay would count too, and each stage is measured alone.
                        row["expected_gib"] = round(plan.stages[stage] / GIB, 2)
                    row["budget_gib"] = round(budget.gpu / GIB, 2)
                    what = row["what"].removeprefix(name)
                    if given is None:
                        free[what] = row["ms"]
                    if free.get(what):
                        row["times_no_limit"] = round(row["ms"] / free[what], 3)
                    yield row


def _stages(plan: MemoryPlan, config: NablaConfig) -> dict[str, Callable[..., Iterator[Row]]]:
    """What measures each stage of a plan. Each makes models of its own, measures them and drops them."""
    of_stages = {
        "text": _text_rows,
        "picture": _picture_rows,
        "sampling": partial(_forward_rows, config=config),
        "decoding": _decode_rows,
    }
    return {stage: measure for stage, measure in of_stages.items() if stage in plan.stages}


def _stage_rows(
    args: argparse.Namespace, device: torch.device, name: str, measure: Callable[[str], Iterator[Row]]
) -> Iterator[Row]:
    """What a stage measures, and a line where it does not fit."""
    clean(device)
    try:
        yield from measure(name)
    # Not OutOfMemoryError alone: pinned host memory that cannot be had is an error of CUDA's.
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print(f"{name}: FAILED, out of memory: {' '.join(str(error).split())[:300]}", flush=True)


def _text_rows(
    args: argparse.Namespace, video: VideoSettings, device: torch.device, plan: MemoryPlan, name: str
) -> Iterator[Row]:
    """Two prompts, the weights' way to the GPU included."""
    family, encoder = MODELS[args.model], placed_text_encoder(args, device, plan)
    ids = torch.zeros(2, family.text_tokens, dtype=torch.int64, device=device)

    def encode() -> Tensor:
        with on_device(encoder, device, plan.in_turns):
            return family.encode(encoder, ids)

    yield _measured(args, name, encode, device)


def _picture_rows(
    args: argparse.Namespace, video: VideoSettings, device: torch.device, plan: MemoryPlan, name: str
) -> Iterator[Row]:
    """What is given, encoded, the VAE alone: the encoder of pictures takes no time beside it."""
    family = MODELS[args.model]
    vae, (width, height) = family.random_vae(args.model, device), video.size
    family.prepare_encoder(vae, torch.float32)
    encoding = family.workload_for(family.models[args.model], video, getattr(torch, args.dtype)).encoding
    pixels = torch.zeros(1, 3, encoding.frames, height, width, device=device)
    row = _measured(args, name, lambda: family.encode_video(vae, pixels), device)
    yield row | {"frames": encoding.frames, "tiles": plan.encoding_tiles}


def _forward_rows(
    args: argparse.Namespace,
    video: VideoSettings,
    device: torch.device,
    plan: MemoryPlan,
    name: str,
    config: NablaConfig,
) -> Iterator[Row]:
    """Forwards of a batch of one, of which a guided step is two; of experts, those of each and what is between."""
    family, times = MODELS[args.model], []
    transformers = [placed_transformer(args, device, plan, seed) for seed in range(plan.experts)]
    facts = {"attention": config.algorithm, "packing": plan.quantization or args.dtype, "kept_blocks": plan.kept}
    for transformer in transformers:
        apply_attention(transformer, config)

    def forward(predict: Callable[[], Tensor]) -> Tensor:
        out = predict()
        if not out.isfinite().all():
            raise RuntimeError(f"{name}: the forward's result is not finite")
        return out

    forwards = []
    with experts_on_device(transformers, device, plan.in_turns) as experts:
        for number in range(plan.experts):
            # Its inputs go where it is now.
            predict = family.forward(experts.turn_to(number), video)
            forwards.append(partial(forward, predict))
            what = f"{name}, expert {number + 1}" if plan.experts > 1 else name
            row = _measured(args, what, forwards[-1], device)
            times.append(row["ms"])
            yield row | {"step_s": round(2 * row["ms"] / 1000, 2)} | facts
        for prepares in (True, False) if plan.experts > 1 else ():
            lost = [_switch_ms(args, experts, forwards, prepares) - sum(times) for _ in range(args.repeats)]
            how = "as the one before finishes" if prepares else "after it"
            yield row_of(f"{name}, the next expert {how}", [max(0.0, ms) for ms in lost]) | facts


def _switch_ms(
    args: argparse.Namespace, experts: Experts, forwards: Sequence[Callable[[], Tensor]], prepares: bool
) -> float:
    """Of the last forward of the first expert and the first of the second, with what is between."""
    experts.turn_to(0)
    forwards[0]()
    synchronize(args)
    start = time.perf_counter()
    if prepares:
        experts.prepare(1, forwards=1)
    forwards[0]()
    experts.turn_to(1)
    forwards[1]()
    synchronize(args)
    return 1000 * (time.perf_counter() - start)


def _decode_rows(
    args: argparse.Namespace, video: VideoSettings, device: torch.device, plan: MemoryPlan, name: str
) -> Iterator[Row]:
    family = MODELS[args.model]
    vae = family.random_vae(args.model, device)
    family.prepare_decoder(vae, vae_dtype_of(None, getattr(torch, args.dtype)))
    latents = random_latents(vae, video, device)
    row = _measured(args, name, lambda: family.decode(vae, latents), device)
    yield row | {"tiles": plan.tiles}


def _measured(args: argparse.Namespace, name: str, function: Callable[[], Tensor], device: torch.device) -> Row:
    """Times after a first run, and the most that tensors took and that torch held, compiling included."""
    start = time.perf_counter()
    function()
    synchronize(args)
    first = round(time.perf_counter() - start, 1)
    # The peak since `clean` holds the first run too, in which kernels are compiled and tried.
    row = timed(name, function, args, warm=False, first_s=first)
    if device.type != "cuda":
        return row
    peak, held = peak_gpu_bytes(device), torch.cuda.max_memory_reserved(device)
    return row | {"peak_gib": round(peak / GIB, 2), "reserved_gib": round(held / GIB, 2)}


def _link_row(args: argparse.Namespace, device: torch.device) -> Row:
    """A GiB from pinned host memory to the GPU."""
    host = torch.empty(PROBE, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(PROBE, dtype=torch.uint8, device=device)
    row = timed("1 GiB from pinned host memory", lambda: there.copy_(host, non_blocking=True), args)
    return row | {"gb_a_second": round(PROBE / 1e6 / row["ms"], 1)}
