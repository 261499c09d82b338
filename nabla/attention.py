"""The whole operator: plan what depends on the grid alone, then attend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla import backends
from nabla.config import InputError, NablaConfig
from nabla.selection import choose_blocks
from nabla.tiling import TileLayout
from nabla.window import window_blocks


@dataclass(frozen=True)
class Plan:
    """All of an attention that does not depend on q and k. Build with `plan`; `layout` is None for dense attention.

    The threshold is a tensor, so that compiled code serves every value of it.
    """

    config: NablaConfig
    grid: tuple[int, int, int]
    layout: TileLayout | None = None
    cut: Tensor | None = None
    count: Tensor | None = None
    window: Tensor | None = None
    backend: ModuleType | None = None
    grad_backend: ModuleType | None = None
    fixed: Any = None

    @property
    def selects(self) -> bool:
        """Whether blocks are chosen from q and k. Read off the tensors: compiled code would guard on the config's."""
        return self.cut is not None or self.count is not None

    @property
    def backend_name(self) -> str:
        return "sdpa" if self.backend is None else self.backend.__name__.rpartition(".")[2]

    def describe(self) -> str:
        """One line on what runs: algorithm, backend, grid and blocks."""
        grid = f"grid {'x'.join(map(str, self.grid))} = {math.prod(self.grid):,} tokens"
        if self.layout is None:
            return f"dense, {grid}"
        config, layout = self.config, self.layout
        dense = f", first {config.dense_steps} steps dense" if config.dense_steps else ""
        dense += f", layers {', '.join(map(str, config.dense_layers))} dense" if config.dense_layers else ""
        partial = int((~layout.full).sum())
        blocks = f"{layout.blocks:,} blocks of {layout.block} tokens, {partial:,} of them partial"
        return f"{config.algorithm}{dense}, backend {self.backend_name}, {grid}, {blocks}"


def plan(grid: tuple[int, int, int], config: NablaConfig, device: torch.device | str) -> Plan:
    """Prepare attention over a (frames, rows, columns) grid of tokens on a device.

    Checks the chosen backend on first use on that device. Raises `InputError` if the grid is not three positive
    integers or if a backend named in the config does not work there.
    """
    grid = tuple(grid)
    if len(grid) != 3 or not all(isinstance(n, int) and n > 0 for n in grid):
        raise InputError(f"grid {grid} is not three positive integers (frames, rows, columns) of tokens")
    if config.is_dense:
        return Plan(config, grid)
    device = _indexed(torch.device(device))
    layout = TileLayout.build(grid, config.tile, device)
    backend = backends.choose(config.backend, device, layout.block)
    by_gradient = backend if backend.DIFFERENTIABLE else backends.reference if config.backend == "auto" else None
    window = None if config.window is None else window_blocks(layout.tiles, config.window, device)
    if not config.selects:
        fixed = backend.prepare(window[None, None], layout)
        return Plan(config, grid, layout, None, None, window, backend, by_gradient, fixed)
    cut = count = None
    if config.keep is None:
        cut = torch.tensor(1 - config.threshold, dtype=torch.float32, device=device)
    else:
        count = torch.tensor(max(1, round(config.keep * layout.blocks)), device=device)
    return Plan(config, grid, layout, cut, count, window, backend, by_gradient)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Sparse attention of q, k, v (B, S, heads, D), rotary embedding applied, in raster order; same shape and dtype.

    May be traced by torch.compile. Raises `InputError` if the shapes do not fit the plan.
    """
    _check_shapes(q, k, v, plan.grid)
    if plan.layout is None:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    backend = plan.backend
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        backend = plan.grad_backend
        if backend is None:
            raise InputError(f"backend {plan.backend_name} has no backward; use backend: auto or reference to train")
    q, k, v = (plan.layout.to_tiles(x) for x in (q, k, v))
    if plan.fixed is not None and backend is plan.backend:
        prepared = plan.fixed
    else:
        prepared = backend.prepare(_kept_blocks(q, k, plan), plan.layout)
    return plan.layout.to_raster(backend.attend(q, k, v, prepared))


def attention(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], config: NablaConfig) -> Tensor:
    """`attend` with a plan made on the spot: q, k, v (B, S, heads, D) over a (frames, rows, columns) grid."""
    return attend(q, k, v, plan(grid, config, q.device))


def select_blocks(q: Tensor, k: Tensor, grid: tuple[int, int, int], config: NablaConfig) -> Tensor:
    """The blocks that `attention` keeps for q and k (B, S, heads, D) in raster order: (B, heads, N, N) bool.

    Blocks are numbered in raster order of (frame, tile row, tile column). Dense attention keeps all.
    """
    _check_shapes(q, k, k, grid)
    layout = TileLayout.build(grid, config.tile, q.device)
    batch, _, heads, _ = q.shape
    if config.is_dense:
        return torch.ones(batch, heads, layout.blocks, layout.blocks, dtype=torch.bool, device=q.device)
    made = plan(grid, config, q.device)
    kept = _kept_blocks(layout.to_tiles(q), layout.to_tiles(k), made)
    return kept.expand(batch, heads, -1, -1)


@torch.no_grad()
def _kept_blocks(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    if not plan.selects:
        return plan.window[None, None]
    return choose_blocks(q, k, plan.layout, plan.cut, plan.count, plan.window)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int]) -> None:
    if q.ndim != 4 or q.shape != k.shape or k.shape[:3] != v.shape[:3] or q.shape[1] != math.prod(grid):
        raise InputError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit grid {tuple(grid)}: "
            f"all must be (batch, {math.prod(grid)} tokens, heads, head size)"
        )


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
