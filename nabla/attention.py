"""The whole operator: plan what depends on the grid alone, then attend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla import fast_selection
from nabla.backends import BACKENDS, choose
from nabla.config import InputError, NablaConfig
from nabla.selection import Selection
from nabla.tiling import TileLayout


@dataclass(frozen=True, eq=False)
class Plan:
    """All of an attention that does not depend on q and k. Build with `plan`.

    selection: None for dense attention
    backend: the key of `BACKENDS` that inference runs on
    fixed: the blocks prepared for `backend`, where they depend on the window alone
    """

    config: NablaConfig
    grid: tuple[int, int, int]
    selection: Selection | None = None
    backend: str = "sdpa"
    fixed: Any = None

    def describe(self) -> str:
        """One line on what runs: algorithm, backend, grid and blocks."""
        grid = f"grid {'x'.join(map(str, self.grid))} = {math.prod(self.grid):,} tokens"
        if self.selection is None:
            return f"dense, backend {self.backend}, {grid}, no blocks"
        config, layout = self.config, self.selection.layout
        dense = f", first {config.dense_steps} steps dense" if config.dense_steps else ""
        dense += f", layers {', '.join(map(str, config.dense_layers))} dense" if config.dense_layers else ""
        blocks = f"{layout.blocks:,} blocks of {layout.block} tokens, {int((~layout.full).sum()):,} of them partial"
        return f"{config.algorithm}{dense}, backend {self.backend}, {grid}, {blocks}"


@torch.inference_mode(False)
def plan(grid: tuple[int, int, int], config: NablaConfig, device: torch.device | str) -> Plan:
    """Prepare attention over a (frames, rows, columns) grid of tokens on a device.

    Checks the chosen backend on first use on that device. Raises `InputError` if the grid is not three positive
    integers or if a backend named in the config does not work there.
    """
    grid = tuple(grid)
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if config.is_dense:
        TileLayout.check_grid(grid)
        return Plan(config, grid)
    selection = Selection.build(grid, config, device)
    backend = choose(config.backend, device, config.block)
    fixed = BACKENDS[backend].prepare(selection.window, selection.layout) if selection.is_fixed else None
    return Plan(config, grid, selection, backend, fixed)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Sparse attention of q, k, v (B, S, heads, D), rotary embedding applied, in raster order; same shape and dtype.

    Under `backend: auto`, what the plan's backend cannot do (gradients, float64) is done by the reference. May be
    traced by torch.compile. Raises `InputError` if the shapes do not fit the plan, or if a backend that the config
    names cannot do it.
    """
    _check_shapes(q, k, v, plan.grid)
    if plan.selection is None:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    name = _backend_for(q, k, v, plan)
    backend, selection = BACKENDS[name], plan.selection
    q, k, v = (selection.layout.to_tiles(x) for x in (q, k, v))
    if plan.fixed is not None and name == plan.backend:
        prepared = plan.fixed
    else:
        prepared = backend.choose(q, k, selection)
    return selection.layout.to_raster(backend.attend(q, k, v, prepared))


def attention(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], config: NablaConfig) -> Tensor:
    """`attend` with a plan made on the spot: q, k, v (B, S, heads, D) over a (frames, rows, columns) grid."""
    return attend(q, k, v, plan(grid, config, q.device))


def select_blocks(q: Tensor, k: Tensor, grid: tuple[int, int, int], config: NablaConfig) -> Tensor:
    """The blocks that `attention` keeps for q and k (B, S, heads, D) in raster order: (B, heads, N, N) bool.

    Blocks are numbered in raster order of (frame, tile row, tile column). Dense attention keeps all.
    """
    _check_shapes(q, k, k, grid)
    batch, _, heads, _ = q.shape
    if config.is_dense:
        blocks = TileLayout.build(grid, config.tile, q.device).blocks
        return torch.ones(batch, heads, blocks, blocks, dtype=torch.bool, device=q.device)
    selection = Selection.build(grid, config, q.device)
    q, k = selection.layout.to_tiles(q), selection.layout.to_tiles(k)
    fast = config.backend != "reference" and fast_selection.applies(q, selection)
    blocks = fast_selection.select_blocks(q, k, selection) if fast else selection.blocks(q, k)
    return blocks.expand(batch, heads, -1, -1)


def _backend_for(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> str:
    backend = BACKENDS[plan.backend]
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if trains and not backend.DIFFERENTIABLE:
        lack = "has no backward"
    elif backend.DTYPES is not None and q.dtype not in backend.DTYPES:
        lack = f"does not take {q.dtype}"
    else:
        return plan.backend
    if plan.config.backend != "auto":
        raise InputError(f"backend {plan.backend} {lack}; use backend: auto or reference")
    return "reference"


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int]) -> None:
    if q.ndim != 4 or not q.shape == k.shape == v.shape or q.shape[1] != math.prod(grid):
        raise InputError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit grid {tuple(grid)}: "
            f"all must be (batch, {math.prod(grid)} tokens, heads, head size)"
        )
