"""Models with random weights put where a plan of memory has them, within a budget that is enforced."""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nabla import InputError
from wan.attention.compile import compile_blocks
from wan.caches.ran import blocks_left_out
from wan.config.settings import VideoSettings
from wan.memory.budget import budget_of, limit
from wan.memory.planner import GB, MemoryBudget, MemoryPlan, choose
from wan.memory.streaming import stream_blocks
from wan.quantize.quantizer import check_quantization, make_quantizer
from wan.tools.benchmark.models import MODELS
from wan.tools.benchmark.timing import label

# A budget that no machine has, for devices without a limit.
NO_LIMIT = 10_000.0


@contextlib.contextmanager
def limited(args: argparse.Namespace, device: torch.device, given: float | None) -> Iterator[MemoryBudget]:
    """A budget in GB, or all there is, enforced."""
    if device.type != "cuda":
        yield MemoryBudget(int((given or NO_LIMIT) * GB), *[int(NO_LIMIT * GB)] * 2)
        return
    clean(device)
    budget = budget_of(device, "auto" if given is None else given)
    limit(device, budget)
    try:
        yield budget
    finally:
        # The budget that comes next is taken of all that is free.
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)


def plan_within(
    args: argparse.Namespace, video: VideoSettings, budget: MemoryBudget, device: torch.device
) -> MemoryPlan:
    """The plan of a video; raises `InputError` if it does not fit."""
    family, dtype = MODELS[args.model], getattr(torch, args.dtype)
    sizes = family.models[args.model]
    plan = choose(
        *family.weigh_models(sizes, dtype, args.layers),
        family.workload_for(sizes, video, dtype),
        budget,
        "fp8" if args.fp8 else None,
        can_quantize=dtype == torch.bfloat16,
        **family.others_of(sizes),
    )
    for quantization in (plan.quantization, plan.text_quantization):
        check_quantization(quantization, device, dtype)
    return plan


def plans_within(
    args: argparse.Namespace, video: VideoSettings, device: torch.device
) -> Iterator[tuple[str, float | None, MemoryBudget, MemoryPlan]]:
    """The plan of a video in all that there is, then in each budget that is asked for, which holds meanwhile.

    With a name for its rows, and the budget in GB (None for all that there is) and in bytes. Each plan is printed, and
    why there is none where the video does not fit.
    """
    for given in [None, *args.budget]:
        name = f"{label(video)}: {'no limit' if given is None else f'{given:g} GB'}"
        with limited(args, device, given) as budget:
            try:
                plan = plan_within(args, video, budget, device)
            except InputError as error:
                print(f"{name}: {error}")
                continue
            print(f"{name}: {plan.describe(budget, args.dtype)}", flush=True)
            yield name, given, budget, plan


def placed_transformer(args: argparse.Namespace, device: torch.device, plan: MemoryPlan, seed: int) -> nn.Module:
    """A transformer where it waits, its blocks compiled."""
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
    transformer = family.random_transformer(args.model, dtype, device, seed, layers=args.layers, place=place)
    compiled, blocks = family.spec.blocks_of(transformer), family.all_blocks(transformer)
    family.as_ours(transformer)
    compile_blocks(compiled)
    if plan.in_turns:
        always = len(blocks) - len(compiled) + 1
        stream_blocks(transformer, blocks, device, plan.kept, plan.pinned, blocks_left_out, always)
    return transformer


def placed_text_encoder(args: argparse.Namespace, device: torch.device, plan: MemoryPlan) -> Any:
    """The text encoder where it waits."""
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
    return encoder


def clean(device: torch.device) -> None:
    """Let go of what earlier models took, and of their peak."""
    torch._dynamo.reset()
    # A model and its hooks hold each other until they are collected.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
