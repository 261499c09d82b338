"""The world of the `shapes` data set: what a scene is made of, and how to choose at random.

Positions are shares of the frame's width and height, lengths shares of its shorter side, times shares of the clip, so
that a scene looks the same at every size and number of frames.
"""

from __future__ import annotations

import itertools
import zlib
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Point = tuple[float, float]

KINDS = ("circle", "square", "triangle", "star", "diamond", "ring", "cross", "heart")
SIZES = {"small": 0.1, "medium": 0.15, "large": 0.21}
SMALLEST, BIGGEST = 0.09, 0.21  # radii between which shapes grow and shrink
PATTERNS = ("striped", "dotted", "checkered")
SHADINGS = ("flat", "shaded", *PATTERNS)
# To the right and down, as positions count.
STEPS: dict[str, Point] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up left": (-1, -1),
    "up right": (1, -1),
    "down left": (-1, 1),
    "down right": (1, 1),
    "still": (0, 0),
}
MOTIONS = tuple(STEPS)
SPINS = {"none": 0, "clockwise": 1, "counterclockwise": -1}
GROWTHS = ("none", "grows", "shrinks")
# Row by row, three a row.
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
TEXTURES = ("plain", "gradient", "striped", "checkered", "cloudy")
RELATIONS = ("apart", "in front of", "behind")
SPLITS = ("train", "held_out")
HELD_OUT_PERIOD = 16


@dataclass(frozen=True)
class Shape:
    """One shape; `said` holds the names of those of its attributes that captions mention.

    start, end: its centre at the first and at the last frame
    radius, angle: (first, last); the angle is in radians, clockwise
    said: of kind, colour, size, shading, motion, place, growth, and spin or spinning (no way round is named)
    """

    kind: str
    colour: str
    size: str
    shading: str
    motion: str
    spin: str
    growth: str
    start: Point
    end: Point
    radius: tuple[float, float]
    angle: tuple[float, float]
    said: frozenset[str]

    @property
    def place(self) -> str:
        """Where in the frame, one of `PLACES`, a still shape is; for others, where they start."""
        return place_of(self.start)


@dataclass(frozen=True)
class Background:
    """A plain colour or a texture in two tones of one; `said` is of colour and texture, `seed` is the clouds'."""

    colour: str
    texture: str
    angle: float
    seed: int
    said: frozenset[str]


@dataclass(frozen=True)
class Scene:
    """One to three shapes in the order in which captions mention them.

    relation: whether the first passes in front of or behind the second, one of `RELATIONS`
    relation_said: whether captions mention that
    """

    shapes: tuple[Shape, ...]
    background: Background
    relation: str
    relation_said: bool

    @property
    def back_to_front(self) -> tuple[Shape, ...]:
        first, *others = self.shapes
        return (*others, first) if self.relation == "in front of" else self.shapes


def place_of(centre: Point) -> str:
    """One of `PLACES` for a centre in shares of width and height."""
    column, row = (bisect((0.4, 0.6), share) for share in centre)
    return PLACES[3 * row + column]


def is_held_out(scene: Scene) -> bool:
    """Whether any shape's colour, kind and motion make a combination (about 1 in 16) that training never sees."""
    return any(map(is_held_out_shape, scene.shapes))


def is_held_out_shape(shape: Shape) -> bool:
    """The same of one shape."""
    # Not `hash`, which is another one in each process.
    return zlib.crc32(f"{shape.colour},{shape.kind},{shape.motion}".encode()) % HELD_OUT_PERIOD == 0


def choose(rng: np.random.Generator, weights: Mapping[T, float]) -> T:
    """A key of `weights`, with a probability in proportion to its value."""
    bounds = list(itertools.accumulate(weights.values()))
    # `hi` for a product that is rounded up to the last bound.
    return list(weights)[bisect(bounds, rng.random() * bounds[-1], hi=len(bounds) - 1)]


def one_of(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    return rng.random() < probability
