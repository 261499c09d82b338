"""Benchmarks of the masks and of one layer's attention."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

import nabla
from nabla import NablaConfig
from nabla.attention import Plan, choose_block_mask, tiles_and_means
from nabla.backends import BACKENDS, inputs_unsupported_reason, verify
from nabla.tiling import TileLayout
from wan.config.settings import VideoSettings
from wan.tools.benchmark.models import MODELS
from wan.tools.benchmark.timing import Row, dense_kernels, label, sparse_configs, timed

# Calls of masks and gathers that are waited for together: in a run the host is ahead of the GPU, and what it takes to
# start a millisecond of kernels would be a good part of that.
QUEUED = 10


def random_qkv(args: argparse.Namespace, grid: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """q, k and v, (1, S, heads, D) each, the same for all rows of a size."""
    sizes = MODELS[args.model].models[args.model]
    shape = 1, math.prod(grid), sizes.heads, sizes.dim // sizes.heads
    torch.manual_seed(0)
    return tuple(torch.randn(shape, device=args.device, dtype=getattr(torch, args.dtype)) for _ in range(3))


@torch.no_grad()
def mask_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """A layer's block lists from q and k: the pooling rides on the gather into tiles, so it costs their difference."""
    for video in videos:
        grid, name = video.token_grid, label(video)
        q, k, _ = random_qkv(args, grid)
        for config in [*sparse_configs(args), NablaConfig(threshold=0.7, backend=args.backend)]:
            plan = nabla.plan(grid, config, device, q.dtype, q.shape[-1])
            selection, backend = plan.selection, BACKENDS[plan.backend]
            means = [tiles_and_means(x, selection.layout)[1] for x in (q, k)]
            yield timed(
                f"{name}: lists, {config.algorithm}, {plan.backend}",
                lambda: backend.choose(*means, selection),
                args,
                calls=QUEUED,
            )
        yield from gather_rows(args, name, grid, q, k)
        yield timed(f"{name}: kept blocks by sorting", lambda: selection.block_mask(*means), args)


def gather_rows(args: argparse.Namespace, name: str, grid: tuple[int, int, int], q: Tensor, k: Tensor) -> Iterator[Row]:
    """The gather of q and k (B, S, heads, D) into tiles, with means of their parts and without."""
    for pool in sorted({config.pool or config.tile for config in sparse_configs(args)}, reverse=True):
        layout = TileLayout.build(grid, NablaConfig().tile, q.device, pool)
        what = f"{name}: gather of q and k with means of {layout.parts} parts"
        yield timed(what, lambda: [tiles_and_means(x, layout) for x in (q, k)], args, calls=QUEUED)
    yield timed(f"{name}: gather of q and k", lambda: [layout.to_tiles(x) for x in (q, k)], args, calls=QUEUED)


@torch.no_grad()
def attention_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """One layer's attention over chosen blocks, masks apart, and whole.

    tflops counts kept pairs of tokens, block_tflops whole blocks, in which padding counts too.
    """
    for video in videos:
        grid, name = video.token_grid, label(video)
        q, k, v = random_qkv(args, grid)
        # Two products, of queries with keys and of probabilities with values, of 2 S^2 D operations a head each.
        flops = 4 * q.shape[1] ** 2 * q.shape[2] * q.shape[3]
        for kernel, context in {} if args.no_dense else dense_kernels(device).items():
            with context():
                row = timed(f"{name}: dense, {kernel}", lambda: nabla.attention(q, k, v, grid, NablaConfig()), args)
            yield row | {"tflops": round(flops / row["ms"] / 1e9, 1)}
        for config in sparse_configs(args):
            for backend in backends_for(config, q):
                plan = nabla.plan(grid, replace(config, backend=backend), device, q.dtype, q.shape[-1])
                yield kernel_row(args, f"{name}: {backend}, {config.algorithm}", backend, q, k, v, plan)
                what = f"{name}: attend by {backend}, {config.algorithm}"
                yield timed(what, lambda: nabla.attend(q, k, v, plan), args)
        for keep in args.keep:
            if row := fa4_row(args, f"{name}: FlashAttention-4, 128-token blocks, keep {keep}", grid, q, k, v, keep):
                yield row


def backends_for(config: NablaConfig, q: Tensor) -> list[str]:
    """The backends that can run a config for q (B, S, heads, D), or of these the one that it names."""
    # The reference is exact and slow, and stands in no table.
    names = [name for name in BACKENDS if name != "reference" and config.backend in (name, "auto")]
    names = [name for name in names if not inputs_unsupported_reason(BACKENDS[name], q.dtype, q.shape[-1])]
    return [
        name for name in names if not verify(name, q.device, config.block, q.dtype, q.shape[-1], dropped=config.dropped)
    ]


def kernel_row(args: argparse.Namespace, what: str, backend: str, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Row:
    """The kernel alone, on q, k and v (B, S, heads, D) in tiles already and with its lists made."""
    layout = plan.selection.layout
    (q_tiles, q_means), (k_tiles, k_means) = (tiles_and_means(x, layout) for x in (q, k))
    v_tiles = layout.to_tiles(v)
    prepared = BACKENDS[backend].choose(q_means, k_means, plan.selection)
    kept = choose_block_mask(q_means, k_means, plan.selection, backend)
    # For each kept block its rows times its columns, without padding: (B, heads, N, N) by the tokens in each of N
    # blocks.
    pairs = (kept.double() @ layout.sizes.double() @ layout.sizes.double()).sum().item()
    row = timed(what, lambda: BACKENDS[backend].attend(q_tiles, k_tiles, v_tiles, prepared), args)
    # In TFLOP/s, of one pair of a query and a key.
    rate = 4 * q.shape[3] / row["ms"] / 1e9
    blocks = kept.sum().item()
    per_block = round(1e6 * row["ms"] / blocks, 3)
    whole = round(rate * blocks * layout.block**2, 1)
    return row | {"tflops": round(rate * pairs, 1), "block_tflops": whole, "ns_per_block": per_block}


def fa4_row(
    args: argparse.Namespace, what: str, grid: tuple, q: Tensor, k: Tensor, v: Tensor, keep: float
) -> Row | None:
    """FlashAttention-4 where it is installed and the grid has no partial tiles; checked against flex on one head."""
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_fwd
    except ImportError:
        return None
    # Its blocks are of 128 tokens. Without partial tiles every list is one of full blocks, which need no mask.
    plan = nabla.plan(grid, NablaConfig(keep=keep, tile=(1, 8, 16), backend="flex"), q.device)
    layout = plan.selection.layout
    if layout.has_partial_tiles:
        return None
    (q, q_means), (k, k_means) = (tiles_and_means(x, layout) for x in (q, k))
    v = layout.to_tiles(v)
    prepared = BACKENDS["flex"].choose(q_means, k_means, plan.selection)
    lists = prepared.full
    # Lists of partial blocks come first, and are empty.
    none = torch.zeros_like(lists.counts), torch.zeros_like(lists.indices)
    blocks = BlockSparseTensorsTorch(*none, *lists, block_size=(layout.block, layout.block))
    # (B, heads, S, D) -> (B, S, heads, D), as this kernel takes them.
    tokens_first = [x.transpose(1, 2) for x in (q, k, v)]
    out = _flash_attn_fwd(*tokens_first, block_sparse_tensors=blocks)[0].transpose(1, 2)
    exact = BACKENDS["flex"].attend(q, k, v, prepared)
    error = ((out - exact).float().norm() / exact.float().norm()).item()
    row = timed(what, lambda: _flash_attn_fwd(*tokens_first, block_sparse_tensors=blocks), args)
    flops = 4 * q.shape[3] * lists.counts.sum().item() * layout.block**2
    return row | {"tflops": round(flops / row["ms"] / 1e9, 1), "difference_to_flex": f"{error:.1e}"}
