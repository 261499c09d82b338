"""Benchmarks of forward and backward: of the attention alone, and of a transformer's blocks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import nabla
from nabla import NablaConfig
from nabla.backends import BACKENDS, inputs_unsupported_reason, verify
from wan.attention.compile import compile_blocks
from wan.config.settings import VideoSettings
from wan.models.attention import apply_attention
from wan.models.wan.random_checkpoint import random_transformer
from wan.tools.benchmark.attention import random_qkv
from wan.tools.benchmark.timing import Row, dense_kernels, label, peak_memory, reset_peak, sparse_configs, timed
from wan.tools.benchmark.wan_models import wan_inputs

# Of a model that trains over several GPUs one block stands for all.
LAYERS = {"t2v-14B": 1}
# Of attention's two matrix products, each has two of its size in the backward, which computes one of them again.
BACKWARD_FLOPS = 2.5


def training_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """Forward and backward together, dense and sparse; `speedup` is against the first dense kernel of the same run.

    Of the 14B one block is taken, unless `--layers` says otherwise. Nothing of an optimizer is in it.
    """
    for video in videos:
        yield from attention_rows(args, video, device)
        yield from block_rows(args, video, device)


def attention_rows(args: argparse.Namespace, video: VideoSettings, device: torch.device) -> Iterator[Row]:
    """One layer's attention with its gradients, from and to raster order, by every backend that has them."""
    grid, name = video.token_grid, f"{label(video)}: attention"
    q, k, v = (x.requires_grad_() for x in random_qkv(args, grid))
    gradient = torch.randn_like(q)
    flops = (1 + BACKWARD_FLOPS) * 4 * q.shape[1] ** 2 * q.shape[2] * q.shape[3]
    dense = None

    def row_of(what: str, config: NablaConfig) -> Row:
        torch._dynamo.reset()
        plan = nabla.plan(grid, config, device, q.dtype, q.shape[-1], trains=True)
        attend = torch.compile(partial(nabla.attend, plan=plan), fullgraph=True, dynamic=False)
        row = timed_backward(args, what, lambda: attend(q, k, v), [q, k, v], gradient)
        # Of all the pairs of tokens, those that are computed.
        kept = 1 if config.is_dense else config.keep
        return row | {"tflops": round(kept * flops / row["ms"] / 1e9, 1)}

    for kernel, context in {} if args.no_dense else dense_kernels(device).items():
        with context():
            row = row_of(f"{name}, dense, {kernel}", NablaConfig())
        dense = dense or row
        yield row
    for keep in args.keep:
        for backend in training_backends(args, q):
            row = row_of(f"{name}, {backend}, keep {keep}", NablaConfig(keep=keep, backend=backend))
            yield with_speedup(dense, row)


def training_backends(args: argparse.Namespace, q: Tensor) -> list[str]:
    """The backends that can train on q, of those that are asked for; the reference where there is no other."""
    block, found = NablaConfig().block, []
    for name, backend in BACKENDS.items():
        fits = args.backend in ("auto", name) and not inputs_unsupported_reason(backend, q.dtype, q.shape[-1])
        # The reference is the last in `BACKENDS`.
        wanted = fits and (name != "reference" or not found)
        if wanted and not verify(name, q.device, block, q.dtype, q.shape[-1], trains=True):
            found.append(name)
    return found


def block_rows(args: argparse.Namespace, video: VideoSettings, device: torch.device) -> Iterator[Row]:
    """The transformer's blocks, compiled: dense as diffusers has them, then sparse."""
    layers = args.layers or LAYERS.get(args.model)
    transformer = random_transformer(args.model, getattr(torch, args.dtype), device, layers=layers)
    transformer.requires_grad_(True).train()
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    name = f"{label(video)}: {args.model}, {len(transformer.blocks)} layers"
    name += ", checkpointed" if args.gradient_checkpointing else ""
    dense = None
    for config in [*([] if args.no_dense else [NablaConfig()]), *sparse_configs(args)]:
        torch._dynamo.reset()
        for block in transformer.blocks:
            # The class's own forward again, for the next configuration to be compiled from.
            block.__dict__.pop("forward", None)
        apply_attention(transformer, config)
        compile_blocks(transformer.blocks, trains=True)
        kernel, context = next(iter(dense_kernels(device).items())) if config.is_dense else ("", nullcontext)
        with context():
            row = transformer_row(args, f"{name}, {config.algorithm} {kernel}".strip(), transformer, video)
        if config.is_dense:
            dense = row
        yield row if config.is_dense else with_speedup(dense, row)


def transformer_row(
    args: argparse.Namespace, what: str, transformer: WanTransformer3DModel, video: VideoSettings
) -> Row:
    inputs = wan_inputs(transformer, video, 1)
    gradient = torch.randn_like(inputs[0])
    parameters = list(transformer.parameters())
    row = timed_backward(args, what, lambda: transformer(*inputs, return_dict=False)[0], parameters, gradient)
    plans = transformer.nabla.plans.by_size.values()
    return row | ({"backend": next(iter(plans)).backend} if plans else {})


def timed_backward(
    args: argparse.Namespace, what: str, forward: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor
) -> Row:
    """A row of a forward and its backward, beside the time of the forward in it and the memory of both."""

    def forward_and_backward() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward().backward(gradient)

    forward_and_backward()
    reset_peak(args)
    row = timed(what, forward_and_backward, args, warm=False) | peak_memory(args)
    for leaf in leaves:
        leaf.grad = None
    return row | {"forward_ms": round(timed(what, forward, args)["ms"], 1)}


def with_speedup(dense: Row | None, row: Row) -> Row:
    return row if dense is None else row | {"speedup": round(dense["ms"] / row["ms"], 2)}
