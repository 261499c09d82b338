"""Benchmarks of several GPUs against one of them, under torchrun, with random weights."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nabla import InputError, NablaConfig
from wan.attention.compile import compile_blocks
from wan.config.settings import VideoSettings
from wan.models.attention import apply_attention
from wan.models.wan.fused_gelu import fuse_gelu
from wan.models.wan.latents import decode
from wan.models.wan.processor import TRANSFORMER, velocity_of
from wan.models.wan.random_checkpoint import random_transformer, random_vae
from wan.parallel.collectives import gather_guidance
from wan.parallel.distributed import DistributedContext, started_by_torchrun
from wan.parallel.fsdp import apply_fsdp
from wan.parallel.head_balance import interleaved
from wan.parallel.layout import ParallelLayout
from wan.parallel.sequence_parallel import apply_sequence_parallel
from wan.sampling.loop import Conditions, denoise
from wan.sampling.solvers import make_solver
from wan.tools.benchmark.timing import Row, label, peak_memory, reset_peak, sparse_configs, timed
from wan.tools.benchmark.wan_models import wan_inputs

# Half of the heads keep about the first share of blocks, half the second, in order of their numbers.
UNEVEN_DENSITIES = 0.05, 0.35
UNEVEN_THRESHOLD = 0.7
# Logarithm of the greatest factor on queries, and how often the range up to it is halved.
MOST_SHARPENED, CALIBRATION_ROUNDS = 6.0, 8


@torch.no_grad()
def parallel_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """Forwards and guided steps on one GPU and on all, as `args.rows` says."""
    if not started_by_torchrun():
        raise InputError("mode parallel compares several processes; start it with torchrun")
    with DistributedContext.join(None if device.type == "cuda" else args.device) as distributed:
        args.device = str(distributed.device)
        for name in args.rows:
            for video in videos:
                yield from ROWS[name](args, distributed, video)
                # A model and its hooks hold each other, and two do not fit.
                torch._dynamo.reset()
                gc.collect()


def build_model(
    args: argparse.Namespace, distributed: DistributedContext, layers: int | None = None
) -> WanTransformer3DModel:
    dtype = getattr(torch, args.dtype)
    transformer = random_transformer(args.model, dtype, distributed.device, layers=layers or args.layers)
    fuse_gelu(transformer)
    compile_blocks(transformer.blocks)
    return transformer


def init_ulysses_mesh(distributed: DistributedContext) -> DeviceMesh:
    distributed.init_meshes(ParallelLayout(ulysses=distributed.world_size))
    return distributed.ulysses_mesh


def compare(args: argparse.Namespace, what: str, function: Callable[[], object], alone: Row | None = None) -> Row:
    """A row of forwards, after two that compile and balance heads, with its speed-up over that of one GPU."""
    for _ in range(2):
        function()
    dist.barrier()
    reset_peak(args)
    row = timed(what, function, args, warm=False) | peak_memory(args)
    # Those that share work take as long as the slowest GPU, and GPUs of a kind differ.
    every = [0.0] * dist.get_world_size()
    dist.all_gather_object(every, row["ms"])
    row |= {"ms_of_each": [round(ms, 1) for ms in every]}
    return row if alone is None else row | {"speedup": round(alone["ms"] / row["ms"], 3)}


def even_rows(args: argparse.Namespace, distributed: DistributedContext, video: VideoSettings) -> Iterator[Row]:
    transformer = build_model(args, distributed)
    inputs = wan_inputs(transformer, video, 1)
    forward = partial(transformer, *inputs, return_dict=False)
    every = [*([] if args.no_dense else [NablaConfig()]), *sparse_configs(args)]
    alone = {}
    for config in every:
        apply_attention(transformer, config)
        # Every process by itself, all at once: the model has no hooks yet by which they would wait for each other.
        alone[config] = compare(args, f"{label(video)}: forward, {config.algorithm}, one GPU", forward)
        yield alone[config]
    apply_sequence_parallel(transformer, init_ulysses_mesh(distributed), TRANSFORMER)
    for config in every:
        apply_attention(transformer, config)
        what = f"{label(video)}: forward, {config.algorithm}, ulysses {distributed.world_size}"
        yield compare(args, what, forward, alone[config]) | {"by_peers": transformer.sequence_parallel.by_peers}
        if transformer.sequence_parallel.by_peers:
            transformer.sequence_parallel.by_peers = False
            yield compare(args, f"{what}, by collectives", forward, alone[config])
            transformer.sequence_parallel.by_peers = True


def uneven_rows(args: argparse.Namespace, distributed: DistributedContext, video: VideoSettings) -> Iterator[Row]:
    """Half the heads sparse, half dense, in adjacent order: as they come, dealt out in turn, and by what they kept."""
    config = NablaConfig(threshold=UNEVEN_THRESHOLD, backend=args.backend)
    mesh = init_ulysses_mesh(distributed)
    transformer = build_model(args, distributed)
    forward = partial(transformer, *wan_inputs(transformer, video, 1), return_dict=False)
    apply_attention(transformer, config)
    calibrate_densities(transformer, forward)
    alone = compare(args, f"{label(video)}: forward, uneven heads, one GPU", forward)
    yield alone
    apply_sequence_parallel(transformer, mesh, TRANSFORMER)
    heads = transformer.sequence_parallel.heads
    rebalance = transformer.sequence_parallel.rebalance
    in_turn = interleaved(heads, mesh.size())
    # None leaves the order to `rebalance`, which measures in the two forwards before a row is timed.
    orders = {"as they come": torch.arange(heads), "in turn": in_turn, "by what they kept": None}
    for name, order in orders.items():
        transformer.sequence_parallel.rebalance = rebalance if order is None else lambda densities: None
        if order is not None:
            transformer.sequence_parallel.head_order = order.repeat(len(transformer.blocks), 1)
            # Taken from `head_order` anew by the next forward.
            transformer.sequence_parallel.device_order = None
        apply_attention(transformer, config)
        row = compare(args, f"{label(video)}: forward, uneven heads, dealt {name}", forward, alone)
        kept = torch.stack([layer.density for layer in transformer.nabla.layers])
        yield row | {"kept_here": round(kept.mean().item(), 3)}


def calibrate_densities(transformer: WanTransformer3DModel, forward: Callable[[], object]) -> None:
    """Set the norms of queries so that each head keeps its share of `UNEVEN_DENSITIES`, nearly, by bisection."""
    modules = [block.attn1 for block in transformer.blocks]
    heads, device = modules[0].heads, modules[0].norm_q.weight.device
    applied = transformer.nabla
    applied.measure_density(applied.layers, device)
    few, many = UNEVEN_DENSITIES
    wanted = torch.where(torch.arange(heads, device=device) < heads // 2, few, many)
    low = torch.zeros(len(modules), heads, device=device)
    high = torch.full_like(low, MOST_SHARPENED)
    for _ in range(CALIBRATION_ROUNDS):
        middle = (low + high) / 2
        for module, factors in zip(modules, middle.exp()):
            weight = module.norm_q.weight
            # Longer queries make sharper maps, of which fewer blocks hold what the threshold asks for. One a head.
            weight.copy_(factors.repeat_interleave(len(weight) // heads))
        forward()
        # Too dense: sharper, so the range above the middle; else the range below.
        is_dense = torch.stack([layer.density for layer in applied.layers]) > wanted
        low, high = torch.where(is_dense, middle, low), torch.where(is_dense, high, middle)


def guidance_rows(args: argparse.Namespace, distributed: DistributedContext, video: VideoSettings) -> Iterator[Row]:
    """A guided step: both branches in turn, and side by side on two GPUs."""
    if distributed.world_size % 2:
        return
    transformer = build_model(args, distributed)
    inputs = wan_inputs(transformer, video, 1)
    # Pairs of processes share a step, one branch each.
    distributed.init_meshes(ParallelLayout(cfg=2, replicas=distributed.world_size // 2))
    branches = distributed.cfg_mesh

    def forward() -> Tensor:
        return transformer(*inputs, return_dict=False)[0].float()

    for config in sparse_configs(args):
        apply_attention(transformer, config)
        what = f"{label(video)}: guided step, {config.algorithm}"
        alone = compare(args, f"{what}, one GPU", lambda: (forward(), forward()))
        yield alone
        yield compare(args, f"{what}, cfg 2", lambda: gather_guidance(forward(), branches), alone)


def same_video_rows(args: argparse.Namespace, distributed: DistributedContext, video: VideoSettings) -> Iterator[Row]:
    """PSNR of the video of all GPUs to that of one, from the same noise."""
    transformer = build_model(args, distributed)
    latents, _, context = wan_inputs(transformer, video, 1)

    def sample() -> Tensor:
        solver = make_solver("unipc", args.steps, 5.0, distributed.device)
        predict = partial(velocity_of, transformer)
        return denoise(predict, latents.float(), Conditions(context, -context), solver, 5.0)

    apply_attention(transformer, sparse_configs(args)[0])
    alone = sample()
    apply_sequence_parallel(transformer, init_ulysses_mesh(distributed), TRANSFORMER)
    apply_attention(transformer, sparse_configs(args)[0])
    shared = sample()
    vae = random_vae(args.model, distributed.device)
    error = (decode(vae, alone) - decode(vae, shared)).square().mean().item()
    # Videos in [-1, 1] have a peak of 2, whose square is 4.
    psnr = round(10 * math.log10(4 / max(error, 1e-12)), 1)
    change = round(((alone - shared).norm() / alone.norm()).item(), 5)
    what = f"{label(video)}: {args.steps} guided steps, {sparse_configs(args)[0].algorithm}, one GPU and ulysses"
    yield {"what": what, "ms": 0.0, "low": 0.0, "high": 0.0, "psnr": psnr, "change_of_latents": change}


def sharded_rows(args: argparse.Namespace, distributed: DistributedContext, video: VideoSettings) -> Iterator[Row]:
    transformer = build_model(args, distributed)
    forward = partial(transformer, *wan_inputs(transformer, video, 1), return_dict=False)
    config = sparse_configs(args)[0]
    mesh = init_ulysses_mesh(distributed)
    apply_sequence_parallel(transformer, mesh, TRANSFORMER)
    apply_attention(transformer, config)
    what = f"{label(video)}: forward, {config.algorithm}, ulysses {distributed.world_size}"
    whole = compare(args, f"{what}, whole weights", forward)
    yield whole
    # After the row of whole weights, since nothing undoes it.
    apply_fsdp(transformer, transformer.blocks, mesh)
    yield compare(args, f"{what}, sharded weights", forward, whole)


ROWS = {
    "even": even_rows,
    "uneven": uneven_rows,
    "guidance": guidance_rows,
    "video": same_video_rows,
    "sharded": sharded_rows,
}
