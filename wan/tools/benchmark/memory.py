"""Runs within a budget of GPU memory beside the one without: time and real peak of each stage, with random weights.

Torch's memory is limited to each budget, so that a run that exceeded it would fail; its row then says so.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from nabla import InputError, NablaConfig
from wan.attention.compile import compile_blocks
from wan.caches.ran import blocks_left_out
from wan.config.settings import VideoSettings
from wan.memory.budget import budget_of, limit
from wan.memory.decoding import vae_dtype_of
from wan.memory.estimates import GIB
from wan.memory.peak import peak_gpu_bytes
from wan.memory.placement import on_device
from wan.memory.planner import GB, MemoryBudget, MemoryPlan, choose
from wan.memory.streaming import stream_blocks
from wan.models.attention import apply_attention
from wan.quantize.quantizer import check_quantization, make_quantizer
from wan.tools.benchmark.models import MODELS
from wan.tools.benchmark.timing import Row, label, sparse_configs, synchronize, timed
from wan.tools.benchmark.transformer import random_latents

# A budget that no machine has, for devices without a limit.
NO_LIMIT = 10_000.0
PROBE = 2**30


@torch.no_grad()
def memory_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """For each video: all that the GPU has, then each budget. Rows of a forward compare with the first one."""
    if device.type == "cuda":
        yield _link_row(args, device)
    config = sparse_configs(args)[0]
    for video in videos:
        free: dict[str, float] = {}
        for given in [None, *args.budget]:
            name = f"{label(video)}: {'no limit' if given is None else f'{given:g} GB'}"
            with _limited(args, device, given) as budget:
                try:
                    plan = _plan(args, video, budget, device)
                except InputError as error:
                    print(f"{name}: {error}")
                    continue
                print(f"{name}: {plan.describe(budget, args.dtype)}", flush=True)
                # Each makes a model of its own, measures it and drops it.
                stages = {"text": _text_row, "sampling": partial(_forward_row, config=config), "decoding": _decode_row}
                for stage, measure in stages.items():
                    row = _stage_row(args, device, f"{name}, {stage}", partial(measure, args, video, device, plan))
                    if row is None:
                        continue
                    if plan.in_turns:
                        # Else models that stay would count too, and each stage is measured alone.
                        row["expected_gib"] = round(plan.stages[stage] / GIB, 2)
                    row["budget_gib"] = round(budget.gpu / GIB, 2)
                    if given is None:
                        free[stage] = row["ms"]
                    if stage in free:
                        row["times_no_limit"] = round(row["ms"] / free[stage], 3)
                    yield row


@contextlib.contextmanager
def _limited(args: argparse.Namespace, device: torch.device, given: float | None) -> Iterator[MemoryBudget]:
    """A budget in GB, or all there is, enforced."""
    if device.type != "cuda":
        yield MemoryBudget(int((given or NO_LIMIT) * GB), *[int(NO_LIMIT * GB)] * 2)
        return
    _clean(device)
    budget = budget_of(device, "auto" if given is None else given)
    limit(device, budget)
    try:
        yield budget
    finally:
        # The budget that comes next is taken of all that is free.
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)


def _plan(args: argparse.Namespace, video: VideoSettings, budget: MemoryBudget, device: torch.device) -> MemoryPlan:
    family, dtype = MODELS[args.model], getattr(torch, args.dtype)
    sizes = family.models[args.model]
    plan = choose(
        *family.weigh_models(sizes, dtype, args.layers),
        family.workload_for(sizes, video, dtype),
        budget,
        "fp8" if args.fp8 else None,
        can_quantize=dtype == torch.bfloat16,
    )
    for quantization in (plan.quantization, plan.text_quantization):
        check_quantization(quantization, device, dtype)
    return plan


def _stage_row(args: argparse.Namespace, device: torch.device, name: str, measure: Callable[[str], Row]) -> Row | None:
    """What a stage measures, or None and a line if it does not fit."""
    _clean(device)
    try:
        return measure(name)
    # Not OutOfMemoryError alone: pinned host memory that cannot be had is an error of CUDA's.
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print(f"{name}: FAILED, out of memory: {' '.join(str(error).split())[:300]}", flush=True)
        return None


def _text_row(args: argparse.Namespace, video: VideoSettings, device: torch.device, plan: MemoryPlan, name: str) -> Row:
    """Two prompts, the weights' way to the GPU included."""
    family = MODELS[args.model]
    encoder = family.random_text_encoder(args.model, getattr(torch, args.dtype), device)
    blocks = family.text_blocks(encoder)
    # Packed on the GPU and kept on the host, from where blocks are streamed.
    quantizer = make_quantizer(encoder, blocks, plan.text_quantization, device, torch.device("cpu"))
    if quantizer is not None:
        state = {name: quantizer(name, tensor) for name, tensor in encoder.state_dict().items()}
        encoder.load_state_dict(state, assign=True)
    if plan.text == "stream" or quantizer is not None:
        # A quantised encoder that stays whole is a stream that keeps all of its blocks.
        kept = 0 if plan.text == "stream" else len(blocks)
        stream_blocks(encoder, blocks, device, kept, plan.pinned)
    elif not plan.in_turns:
        encoder.to(device)
    ids = torch.zeros(2, family.text_tokens, dtype=torch.int64, device=device)

    def encode() -> Tensor:
        with on_device(encoder, device, plan.in_turns):
            return family.encode(encoder, ids)

    return _measured(args, name, encode, device)


def _forward_row(
    args: argparse.Namespace,
    video: VideoSettings,
    device: torch.device,
    plan: MemoryPlan,
    name: str,
    config: NablaConfig,
) -> Row:
    """Forwards of a batch of one; a guided step is two."""
    transformer = _transformer(args, device, plan)
    apply_attention(transformer, config)
    with on_device(transformer, device, plan.in_turns):
        predict = MODELS[args.model].forward(transformer, video)

        def forward() -> Tensor:
            out = predict()
            if not out.isfinite().all():
                raise RuntimeError(f"{name}: the forward's result is not finite")
            return out

        row = _measured(args, name, forward, device)
    return row | {"attention": config.algorithm, "packing": plan.quantization or args.dtype, "kept_blocks": plan.kept}


def _transformer(args: argparse.Namespace, device: torch.device, plan: MemoryPlan) -> nn.Module:
    family = MODELS[args.model]
    home = torch.device("cpu") if plan.in_turns else device

    def place(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
        blocks = family.all_blocks(model)
        quantizer = make_quantizer(model, blocks, plan.quantization, device, home, family.float32)

        def placed_one(name: str, tensor: Tensor) -> Tensor:
            # What is not packed comes back as it is.
            packed = tensor if quantizer is None else quantizer(name, tensor)
            return tensor.to(home) if packed is tensor else packed

        return placed_one

    dtype = getattr(torch, args.dtype)
    transformer = family.random_transformer(args.model, dtype, device, layers=args.layers, place=place)
    compiled, blocks = family.spec.blocks_of(transformer), family.all_blocks(transformer)
    family.as_ours(transformer)
    compile_blocks(compiled)
    if plan.in_turns:
        always = len(blocks) - len(compiled) + 1
        stream_blocks(transformer, blocks, device, plan.kept, plan.pinned, blocks_left_out, always)
    return transformer


def _decode_row(
    args: argparse.Namespace, video: VideoSettings, device: torch.device, plan: MemoryPlan, name: str
) -> Row:
    family = MODELS[args.model]
    vae = family.random_vae(args.model, device)
    family.prepare_decoder(vae, vae_dtype_of(None, getattr(torch, args.dtype)))
    latents = random_latents(vae, video, device)
    row = _measured(args, name, lambda: family.decode(vae, latents), device)
    return row | {"tiles": plan.tiles}


def _measured(args: argparse.Namespace, name: str, function: Callable[[], Tensor], device: torch.device) -> Row:
    """Times after a first run, and the most that tensors took and that torch held, compiling included."""
    start = time.perf_counter()
    function()
    synchronize(args)
    first = round(time.perf_counter() - start, 1)
    # The peak since `_clean` holds the first run too, in which kernels are compiled and tried.
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


def _clean(device: torch.device) -> None:
    torch._dynamo.reset()
    # A model and its hooks hold each other until they are collected.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
