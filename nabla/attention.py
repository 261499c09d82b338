"""The whole operator: plan what depends on the grid alone, then attend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla import probe
from nabla.backends import BACKENDS, choose, inputs_unsupported_reason
from nabla.backends.interface import Prepared
from nabla.block_lists import from_lists
from nabla.checks import InputError
from nabla.config import NablaConfig
from nabla.dropped import TileMeans, tile_means
from nabla.kernels import block_selection, tile_gather
from nabla.rotary import Rotary, rotate
from nabla.selection import Selection, block_means
from nabla.shares import described_layers, described_steps
from nabla.tiling import TileLayout

# Lists of more entries than this are made and used for a few heads at a time; an entry is 4 bytes, twice that where
# full and partial tiles have lists of their own.
LIST_ENTRIES = 2**28


@dataclass(frozen=True, eq=False)
class Plan:
    """All of an attention that does not depend on q and k. Build with `plan`.

    selection: None for dense attention
    trains: whether gradients can be taken
    backend: the key of `BACKENDS` that runs, forward and backward
    reason: why that one, in a few words
    fixed: the blocks prepared for `backend`, where they depend on the window alone
    """

    config: NablaConfig
    grid: tuple[int, int, int]
    selection: Selection | None = None
    trains: bool = False
    backend: str = "sdpa"
    reason: str = ""
    fixed: Prepared | None = None

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def describe(self, whole: NablaConfig | None = None) -> str:
        """One line on what runs: algorithm, backend, grid and blocks.

        whole: the config of a whole run, where this is the plan of what some layers run in some steps of it
        """
        grid = f"grid {'x'.join(map(str, self.grid))} = {self.tokens:,} tokens"
        if self.selection is None:
            return f"dense, backend {self.backend}, {grid}, no blocks"
        config, layout = whole or self.config, self.selection.layout
        what = config.algorithm + (f" ({config.profile.describe()})" if config.profile else "")
        dense = described_steps(config.dense_steps), described_layers(config.dense_layers)
        extra = "".join(f", {one}" for one in dense if one)
        extra += f", masks kept for {config.mask_refresh} steps" if config.mask_refresh > 1 else ""
        blocks = f"{layout.blocks:,} blocks of {layout.block} tokens, {int((~layout.full).sum()):,} of them partial"
        backend = self.backend + (" with gradients" if self.trains else "")
        return f"{what}{extra}, backend {backend}, {grid}, {blocks}; backend {self.reason}"


class ReusableBlockMask(NamedTuple):
    """A block mask that one `attend` chooses and others take.

    mask: (B, heads, N, N) bool
    reuse: whether to attend by it as it is, rather than to choose it anew and write it there
    """

    mask: Tensor
    reuse: bool


# Plans are kept, and tensors made in inference mode could not be saved for a backward by a later forward.
@torch.inference_mode(False)
def plan(
    grid: tuple[int, int, int],
    config: NablaConfig,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    head_size: int | None = None,
    trains: bool = False,
) -> Plan:
    """Prepare attention over a (frames, rows, columns) grid of tokens on a device.

    dtype, head_size: of q, k and v, so that a backend is chosen which takes them; None where not known
    trains: whether gradients will be taken, so that a backend is chosen which has them
    Checks the chosen backend on first use on that device. Raises `InputError` if the grid is not three positive
    integers, if a backend named in the config does not work there, or if it has no gradients of what is asked for.
    """
    grid = TileLayout.check_grid(grid)
    device = torch.device(device)
    # "cuda" and "cuda:0" do not compare equal, and a backend's check holds for one GPU.
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if config.is_dense:
        return Plan(config, grid)
    selection = Selection.build(grid, config, device, dtype)
    backend, reason = choose(config.backend, device, config.block, dtype, head_size, trains, config.dropped)
    if trains and config.dropped != "none" and backend != "reference":
        raise InputError(
            f"dropped {config.dropped!r} has no gradients on backend {backend}; train without it, or, where little is "
            "to be computed, with backend: reference"
        )
    fixed = None
    # The same blocks in every forward, so they are listed once.
    if selection.is_fixed and selection.window is not None:
        fixed = BACKENDS[backend].prepare(selection.window, selection.layout)
    return Plan(config, grid, selection, trains, backend, reason, fixed)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    rotary: Rotary | None = None,
    block_mask: ReusableBlockMask | None = None,
    density: Tensor | None = None,
) -> Tensor:
    """Sparse attention of q, k, v (B, S, heads, D) in raster order; same shape and dtype.

    rotary: to turn q and k by on their way into tiles; None if they are turned already
    block_mask: where to write which blocks are chosen, or to take them from; None to choose and forget
    density: (heads,) float32, where to write the share of blocks that each head keeps, if given
    For gradients the choice of blocks is a constant. May be traced by torch.compile. Raises `InputError` if the shapes
    do not fit the plan, or if its backend cannot do what is asked.
    """
    _check_shapes(q, k, v, plan.grid)
    if plan.selection is None:
        q, k = (x if rotary is None else rotate(x, rotary) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    _check_backend(q, k, v, plan)
    selection, layout, backend = plan.selection, plan.selection.layout, BACKENDS[plan.backend]
    q, k, means, mean_keys = _queries_and_keys(q, k, plan, rotary)

    # A function, not a loop's body, so that the lists of some heads are freed before those of the next are made.
    def of_heads(start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of = slice(start, start + q.shape[1])
        # Of one head that stands for all, so there is nothing to cut.
        prepared = plan.fixed
        if means is not None:
            prepared = probe.run(probe.MASK, _prepare, plan.backend, selection, means, block_mask, of)
        if density is not None:
            # In place, into memory that the layer holds, so that one compiled graph serves all layers.
            density[of].copy_(backend.block_counts(prepared).float().mean((0, 2)) / layout.blocks)
        # v last: where it comes from other processes, it may still be on its way.
        v, for_dropped = _values(v, layout, None if mean_keys is None else mean_keys[:, of])
        return probe.run(probe.ATTENTION, backend.attend, q, k, v, prepared, for_dropped)

    group = max(1, LIST_ENTRIES // (q.shape[0] * layout.blocks**2))
    # Not slices, of which each would have a gradient of the whole size.
    groups = zip(q.split(group, dim=1), k.split(group, dim=1), v.split(group, dim=2))
    results = [of_heads(number * group, *qkv) for number, qkv in enumerate(groups)]
    return layout.to_raster(results[0] if len(results) == 1 else torch.cat(results, dim=1))


def tiles_and_means(x: Tensor, layout: TileLayout, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
    """(B, S, heads, D) in raster order to tiles (B, heads, N * block, D), rotated, and the means of their parts."""
    if tile_gather.applies(x, layout):
        return tile_gather.tiles_and_means(x, layout, rotary)
    tiles = _rotated_tiles(x, layout, rotary)
    return tiles, block_means(tiles, layout)


def _queries_and_keys(
    q: Tensor, k: Tensor, plan: Plan, rotary: Rotary | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
    """q and k (B, S, heads, D) as tiles, the means by which blocks are chosen, and mean keys that stand for tiles.

    No means where the same blocks are kept in every forward, and no mean keys where nothing stands for dropped tiles.
    """
    assert plan.selection is not None
    layout, is_fixed, stands = plan.selection.layout, plan.fixed is not None, plan.config.dropped != "none"
    if is_fixed and not stands:
        return _rotated_tiles(q, layout, rotary), _rotated_tiles(k, layout, rotary), None, None
    (q, q_means), (k, k_means) = (tiles_and_means(x, layout, rotary) for x in (q, k))
    return q, k, None if is_fixed else (q_means, k_means), tile_means(k, k_means, layout) if stands else None


def _values(v: Tensor, layout: TileLayout, mean_keys: Tensor | None) -> tuple[Tensor, TileMeans | None]:
    """v (B, S, heads, D) as tiles and, if mean keys of tiles are given, these with mean values."""
    if mean_keys is None:
        return layout.to_tiles(v), None
    tiles, means = tiles_and_means(v, layout)
    return tiles, TileMeans(mean_keys, tile_means(tiles, means, layout), layout.sizes)


def _rotated_tiles(x: Tensor, layout: TileLayout, rotary: Rotary | None) -> Tensor:
    """`tiles_and_means` without the means."""
    if tile_gather.applies(x, layout):
        return tile_gather.tiles_and_means(x, layout, rotary)[0]
    return layout.to_tiles(x if rotary is None else rotate(x, rotary))


def _prepare(
    name: str,
    selection: Selection,
    means: tuple[Tensor, Tensor],
    block_mask: ReusableBlockMask | None,
    heads: slice,
) -> Prepared:
    """The blocks that some heads attend to, of means of q and k (B, all heads, N * P, D), prepared for a backend."""
    q, k = means[0][:, heads], means[1][:, heads]
    if block_mask is None:
        # Straight to what the kernel reads, without a mask in between.
        return BACKENDS[name].choose(q, k, selection)
    mask = block_mask.mask[:, heads]
    if not block_mask.reuse:
        mask.copy_(choose_block_mask(q, k, selection, name))
    return BACKENDS[name].prepare(mask, selection.layout)


def choose_block_mask(q: Tensor, k: Tensor, selection: Selection, backend: str) -> Tensor:
    """The blocks that a backend chooses for means q and k (B, heads, N * P, D): (B, heads, N, N) bool."""
    # As the backend's own `choose` has it, so that a mask that is kept names the blocks that are chosen without it.
    if backend != "reference" and block_selection.applies(q, selection):
        return from_lists(*block_selection.choose_lists(q, k, selection))
    return selection.block_mask(q, k)


def attention(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], config: NablaConfig) -> Tensor:
    """`attend` with a plan made on the spot: q, k, v (B, S, heads, D) over a (frames, rows, columns) grid."""
    return attend(q, k, v, plan(grid, config, q.device, q.dtype, q.shape[-1], _needs_gradients(q, k, v)))


def select_blocks(q: Tensor, k: Tensor, grid: tuple[int, int, int], config: NablaConfig) -> Tensor:
    """The blocks that `attention` keeps for q and k (B, S, heads, D) in raster order: (B, heads, N, N) bool.

    Blocks are numbered in raster order of (frame, tile row, tile column). Dense attention keeps all.
    """
    _check_shapes(q, k, k, grid)
    batch, _, heads, _ = q.shape
    if config.is_dense:
        blocks = TileLayout.build(grid, config.tile, q.device).blocks
        return torch.ones(batch, heads, blocks, blocks, dtype=torch.bool, device=q.device)
    selection = Selection.build(grid, config, q.device, q.dtype)
    q_means, k_means = (tiles_and_means(x, selection.layout)[1] for x in (q, k))
    # A window alone is one mask for all.
    return choose_block_mask(q_means, k_means, selection, config.backend).expand(batch, heads, -1, -1)


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check_backend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    if reason := inputs_unsupported_reason(BACKENDS[plan.backend], q.dtype, q.shape[-1]):
        if plan.config.backend != "auto":
            raise InputError(f"backend {plan.backend} {reason}; use backend: auto or reference")
        raise InputError(f"backend {plan.backend} of this plan {reason}; give dtype and head_size to nabla.plan")
    if plan.backend != "reference" and not plan.trains and _needs_gradients(q, k, v):
        raise InputError("this plan is for inference, but gradients are needed; give trains=True to nabla.plan")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int]) -> None:
    if q.ndim != 4 or not q.shape == k.shape == v.shape or q.shape[1] != math.prod(grid):
        raise InputError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit grid {tuple(grid)}: "
            f"all must be (batch, {math.prod(grid)} tokens, heads, head size)"
        )
