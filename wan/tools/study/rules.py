"""Rules that the study compares with those of `nabla.selection`: each scores key blocks, and a share of them is kept.

They are for comparison alone, so they run in plain torch, whatever there is for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nabla import NablaConfig
from nabla.selection import Selection, top_k_mask
from nabla.tiling import TileLayout

# Of means of parts q and k, (B, heads, N * P, D) float32, to scores (B or 1, heads or 1, N, N): the higher, the sooner
# a key block is kept.
Rule = Callable[[Tensor, Tensor, TileLayout], Tensor]
# Scores of tokens held at once.
ENTRIES = 2**28
TOKEN, QUARTER = (1, 1, 1), (1, 4, 4)
# Of windows, in blocks of (frames, rows, columns): those published are long in time.
LONG, CUBE = (11, 3, 3), (3, 3, 3)
# Below any difference of two distances that are not the same.
TIE = 1e-3


def true_mass(q: Tensor, k: Tensor, layout: TileLayout) -> Tensor:
    """The attention that each block of queries pays to each block of keys: the best possible choice for a count.

    q, k: of parts of one token each
    """
    blocks, parts = layout.part_sizes.shape
    valid = layout.part_sizes.flatten() > 0
    rows = max(1, ENTRIES // (q.shape[0] * q.shape[1] * parts * k.shape[2])) * parts
    mass = []
    with tensor_cores():
        for queries, counted in zip(q.split(rows, dim=2), valid.split(rows)):
            scores = (queries @ k.mT / math.sqrt(q.shape[-1])).masked_fill_(~valid, -math.inf)
            # (B, heads, rows, N), then the mean over a block's valid rows.
            shares = scores.softmax(-1).unflatten(-1, (blocks, parts)).sum(-1) * counted[:, None]
            mass.append(shares.unflatten(2, (-1, parts)).sum(3))
    return torch.cat(mass, dim=2) / layout.sizes[:, None]


def log_sum_exp(q: Tensor, k: Tensor, layout: TileLayout) -> Tensor:
    """The log-sum-exp of a block's scores over all pairs of parts, as SGLang's sub-block router has it."""
    blocks, parts = layout.part_sizes.shape
    valid = layout.part_sizes.flatten() > 0
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~(valid[:, None] & valid), -math.inf)
    return scores.unflatten(2, (blocks, parts)).unflatten(4, (blocks, parts)).logsumexp((3, 5))


def radial(q: Tensor, k: Tensor, layout: TileLayout) -> Tensor:
    """A window that halves with each doubling of the distance in time (Radial Attention, arXiv 2506.19852)."""
    time, rows, columns = _distances(layout)
    # Half a block is added, so that of a block's own place too the nearer frames come first.
    space = (rows.square() + columns.square()).sqrt() + 0.5
    return _nearest(space * 2 ** time.clamp(min=1).log2().floor() + TIE * time)


def window(extent: tuple[int, int, int]) -> Rule:
    """A window with edges as `extent`, as large as the count has it, moved at the video's edges (arXiv 2502.04507)."""

    def rule(q: Tensor, k: Tensor, layout: TileLayout) -> Tensor:
        time, rows, columns = (one / length for one, length in zip(_distances(layout), extent))
        corner = torch.maximum(time, torch.maximum(rows, columns))
        return _nearest(corner + TIE * (time + rows + columns))

    return rule


@dataclass
class RandomBlocks:
    """Blocks drawn anew for every head of every layer, and the one of the queries themselves."""

    generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, layout: TileLayout) -> Tensor:
        device = q.device
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(0)
        shape = *q.shape[:2], layout.blocks, layout.blocks
        drawn = torch.rand(shape, generator=self.generators[device], device=device)
        return drawn + torch.eye(layout.blocks, device=device)


@dataclass(frozen=True, eq=False)
class RuleSelection(Selection):
    """A selection by another rule, of as many blocks as the config's share says."""

    rule: Rule = true_mass

    @property
    def is_fixed(self) -> bool:
        # What a window alone decides is left to `block_mask` by all kernels, and so is this.
        return True

    @torch.no_grad()
    def block_mask(self, q: Tensor, k: Tensor) -> Tensor:
        """Which blocks are kept for means of parts q and k: (B or 1, heads or 1, N, N) bool."""
        assert self.count is not None
        with torch.autocast(q.device.type, enabled=False):
            return top_k_mask(self.rule(q, k, self.layout), self.count)


@dataclass(frozen=True)
class NamedRule:
    """How a rule is built, anew for each setting, and of what parts it takes the means; without `build` it is nabla's.

    words: what it is called in tables
    """

    words: str
    pool: tuple[int, int, int] | None = None
    build: Callable[[], Rule] | None = None

    def config(self, keep: float) -> NablaConfig:
        return NablaConfig(keep=keep, pool=self.pool)


# In the order of the tables.
RULES = {
    "means": NamedRule("means of tiles"),
    "parts": NamedRule("2x2 parts", QUARTER),
    "log_sum_exp": NamedRule("log-sum-exp of 2x2 parts", QUARTER, lambda: log_sum_exp),
    "radial": NamedRule("radial window", None, lambda: radial),
    "sta_long": NamedRule("STA window, 11x3x3 in form", None, lambda: window(LONG)),
    "sta_cube": NamedRule("STA window, 3x3x3 in form", None, lambda: window(CUBE)),
    "random": NamedRule("random and the diagonal", None, RandomBlocks),
    "best": NamedRule("best possible choice", TOKEN, lambda: true_mass),
}


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Have float32 products round their factors to TF32, which holds bfloat16's numbers exactly, within."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _distances(layout: TileLayout) -> tuple[Tensor, ...]:
    """How far key blocks are from query blocks along frames, rows and columns, in blocks: (N, N) float32 each."""
    axes = (torch.arange(count, device=layout.sizes.device, dtype=torch.float32) for count in layout.tiles)
    return tuple(
        (place[:, None] - place).abs() for place in (x.flatten() for x in torch.meshgrid(*axes, indexing="ij"))
    )


def _nearest(distance: Tensor) -> Tensor:
    return -distance[None, None]
