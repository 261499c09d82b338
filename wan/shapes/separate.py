"""Shapes of one colour told apart: the parts of a mask that are not connected, followed through the frames."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.shapes.silhouettes import centroids

LEAST_AREA = 0.011  # of the shorter side, squared; the smallest shape of the data set has 0.015
LEAST_LIKENESS = 0.4  # of the largest part's area, for a part to be a shape too rather than a piece of one
LEAST_LASTING = 0.6  # of the frames in which any part is seen


def separated(mask: Tensor, most: int) -> list[Tensor]:
    """A mask (frames, height, width) of 0 and 1, or one for each of the shapes, at most `most`, that mostly lie apart.

    More than `most` are taken for one in pieces. Frames that do not show as many parts as there are shapes are empty in
    all of the masks.
    """
    labels = _labels(mask)
    parts = [_parts(frame) for frame in labels]
    counts = [len(names) for names in parts if names]
    # The number of parts that most frames show.
    count = max(counts, key=counts.count, default=0)
    if not 1 < count <= most or counts.count(count) < LEAST_LASTING * len(counts):
        return [mask]
    shapes = torch.zeros(count, *mask.shape, device=mask.device)
    last = None
    for number, names in enumerate(parts):
        if len(names) == count:
            seen = torch.stack([labels[number] == name for name in names]).float()
            centres = centroids(seen)
            order = _as_before(centres, centres if last is None else last)
            shapes[:, number], last = seen[order], centres[order]
    return list(shapes)


def _as_before(centres: Tensor, last: Tensor) -> list[int]:
    """The order in which centres (n, 2) are nearest to those of the frame before."""
    orders = map(list, itertools.permutations(range(len(centres))))
    return min(orders, key=lambda order: float((centres[order] - last).norm(dim=1).sum()))


def _parts(labels: Tensor) -> list[int]:
    """The labels in a frame (height, width) of what is large enough to be a shape."""
    names, areas = labels[labels > 0].unique(return_counts=True)
    least = LEAST_AREA * min(labels.shape) ** 2
    return [int(name) for name, area in zip(names, areas) if area >= max(least, LEAST_LIKENESS * int(areas.max()))]


def _labels(mask: Tensor) -> Tensor:
    """Numbers (frames, height, width), the same within what is connected in a frame, 0 where the mask is 0."""
    # At half the size, so that the number soon reaches all of a part, and a line of one pixel does not cut it.
    coarse = F.max_pool2d(mask[:, None], 2, ceil_mode=True)
    # A number for each pixel, of which the highest spreads through all that is connected; 0 is left for what is not
    # masked.
    labels = torch.arange(1.0, coarse[0].numel() + 1, device=mask.device).view_as(coarse[0]) * coarse
    while not torch.equal(labels, spread := F.max_pool2d(labels, 3, 1, 1) * coarse):
        labels = spread
    height, width = mask.shape[1:]
    return F.interpolate(labels, scale_factor=2, mode="nearest")[:, 0, :height, :width] * mask
