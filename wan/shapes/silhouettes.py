"""Which kind of shape a mask shows, by the silhouettes of all kinds in all rotations."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.shapes.drawing import OUTLINES
from wan.shapes.scenes import KINDS

TEMPLATE_SIZE, ROTATIONS = 40, 72
TEMPLATE_REACH = 1.9  # in radii of the disc of the same area
# How often a kind looks the same within a full turn; 0 where turning cannot be seen.
SYMMETRIES = {"square": 4, "cross": 4, "triangle": 3, "star": 5, "diamond": 2, "heart": 1, "circle": 0, "ring": 0}


def pixel_grid(mask: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of the centres of the pixels of (frames, height, width), each (height, width)."""
    y, x = (torch.arange(length, device=mask.device) + 0.5 for length in mask.shape[1:])
    return tuple(torch.meshgrid(x, y, indexing="xy"))


def centroids(mask: Tensor) -> Tensor:
    """Centres of mass of (frames, height, width), (frames, 2) as (x, y) in pixels."""
    area = mask.sum((1, 2)).clamp(min=1)
    return torch.stack([(mask * axis).sum((1, 2)) / area for axis in pixel_grid(mask)], -1)


def best_kind(mask: Tensor, centres: Tensor, area: Tensor) -> tuple[str, Tensor, Tensor]:
    """The kind that fits (frames, height, width) best in the half of the frames that it fits best.

    centres, area: as `centroids` and the sum of each frame's mask
    Returns the kind, its correlation with each frame (frames,), at most 1, and its angle there (frames,) in radians.
    """
    height, width = mask.shape[1:]
    # Every frame's mask is sampled about its centre, in radii of the disc of its area: views do not depend on place and
    # size.
    grid = _template_grid(mask.device) * (area / math.pi).sqrt()[:, None, None, None]
    # grid_sample counts from -1 to 1 between the outer edges.
    grid = (grid + centres[:, None, None]) * 2 / centres.new_tensor([width, height]) - 1
    views = _normalised(F.grid_sample(mask[:, None], grid, align_corners=False).flatten(1))
    # Rows have mean 0 and norm 1, so products are correlations: (frames, kinds x rotations) -> the best rotation of
    # each.
    fits, rotations = (views @ _templates(mask.device).T).unflatten(1, (len(KINDS), ROTATIONS)).max(2)
    # Half of the frames, since another shape may hide it in the rest.
    best = int(fits.topk(max(1, len(fits) // 2), dim=0).values.mean(0).argmax())
    return KINDS[best], fits[:, best], rotations[:, best] * (2 * math.pi / ROTATIONS)


def unit_area(kind: str) -> float:
    """The area of a shape of radius 1."""
    return _unit_moments(kind)[0]


@functools.cache
def _unit_moments(kind: str) -> tuple[float, float]:
    """Area and height (downwards) of the centroid of a shape of radius 1; every kind is symmetric in x."""
    axis = torch.linspace(-1.5, 1.5, 601)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = OUTLINES[kind](x, y) < 0
    return float(inside.sum()) * float(axis[1] - axis[0]) ** 2, float(y[inside].mean())


def _template_grid(device: torch.device) -> Tensor:
    """(TEMPLATE_SIZE, TEMPLATE_SIZE, 2) as (x, y), in radii of the disc of the same area."""
    axis = (torch.arange(TEMPLATE_SIZE, device=device) + 0.5) / TEMPLATE_SIZE * 2 - 1
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1) * TEMPLATE_REACH


@functools.lru_cache(maxsize=2)
def _templates(device: torch.device) -> Tensor:
    """Silhouettes around their centroids, (kinds * ROTATIONS, pixels), normalised."""
    x, y = _template_grid(device).unbind(-1)
    angles = torch.arange(ROTATIONS, device=device)[:, None, None] * (2 * math.pi / ROTATIONS)
    turned_x, turned_y = x * angles.cos() + y * angles.sin(), y * angles.cos() - x * angles.sin()
    pixels = TEMPLATE_SIZE / (2 * TEMPLATE_REACH)
    drawn = []
    for kind in KINDS:
        area, below = _unit_moments(kind)
        radius = math.sqrt(math.pi / area)
        # `below` moves the centroid into the middle, where masks have theirs.
        distance = OUTLINES[kind](turned_x / radius, turned_y / radius + below) * radius
        drawn.append((0.5 - distance * pixels).clamp(0, 1).flatten(1))
    return _normalised(torch.cat(drawn))


def _normalised(views: Tensor) -> Tensor:
    """Rows (n, pixels) with mean 0 and norm 1."""
    return F.normalize(views - views.mean(1, keepdim=True), dim=1)
