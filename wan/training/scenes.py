"""The world of the `shapes` data set: what a scene is made of, and how scenes are drawn at random.

Positions are shares of the frame's width and height, lengths shares of its shorter side, times shares of the clip, so
that a scene looks the same at every size and number of frames.
"""

from __future__ import annotations

import itertools
import math
import zlib
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from nabla import InputError
from wan.training.colours import COLOURS, Colour, background_tones, shape_tones, stand_out

T = TypeVar("T")
Point = tuple[float, float]

KINDS = ("circle", "square", "triangle", "star", "diamond", "ring", "cross", "heart")
SIZES = {"small": 0.1, "medium": 0.15, "large": 0.21}
SIZE_JITTER = 0.06
SMALLEST, BIGGEST = 0.09, 0.21  # radii between which shapes grow and shrink
PATTERNS = ("striped", "dotted", "checkered")
SHADINGS = ("flat", "shaded", *PATTERNS)
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
TURN = (2.6, 3.6)  # radians in a clip: a star turns less than half its symmetry within a step of the VAE
GROWTHS = ("none", "grows", "shrinks")
# Row by row, three a row.
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
TEXTURES = ("plain", "gradient", "striped", "checkered", "cloudy")
RELATIONS = ("apart", "in front of", "behind")
SPLITS = ("train", "held_out")

# No outline reaches further from its centre than this many radii.
REACH = 1.2
MARGIN = 0.02
HELD_OUT_PERIOD = 16
TRIES = 60

MOTION_WEIGHTS = dict.fromkeys(MOTIONS, 0.07) | dict.fromkeys(("left", "right", "up", "down"), 0.15) | {"still": 0.12}
BACKGROUND_WEIGHTS = dict.fromkeys(COLOURS, 0.05) | {"white": 0.28, "black": 0.16, "gray": 0.1}
# (shapes, whether the first two cross)
LAYOUTS = {(1, False): 0.6, (2, False): 0.16, (2, True): 0.13, (3, False): 0.06, (3, True): 0.05}


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
    return any(map(_is_held_out, scene.shapes))


def _is_held_out(shape: Shape) -> bool:
    return zlib.crc32(f"{shape.colour},{shape.kind},{shape.motion}".encode()) % HELD_OUT_PERIOD == 0


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """A random scene, the same for the same state of `rng`; most have one shape and a plain background.

    split: "train" for scenes without held-out combinations, "held_out" for scenes with at least one
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is not known; use one of {', '.join(SPLITS)}")
    count, crossing = choose(rng, LAYOUTS)
    while (scene := _draw_scene(rng, count, crossing, split)) is None:
        pass
    return scene


def choose(rng: np.random.Generator, weights: Mapping[T, float]) -> T:
    """A key of `weights`, with a probability in proportion to its value."""
    bounds = list(itertools.accumulate(weights.values()))
    return list(weights)[bisect(bounds, rng.random() * bounds[-1], hi=len(bounds) - 1)]


def one_of(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    return rng.random() < probability


def _draw_scene(rng: np.random.Generator, count: int, crossing: bool, split: str) -> Scene | None:
    """Shapes drawn one after another until each fits with those before; None if one finds no room."""
    background = _draw_background(rng)
    relation = one_of(rng, RELATIONS[1:]) if crossing else "apart"
    shapes: list[Shape] = []
    for slot in range(count):
        must_cross = crossing and slot == 1
        for _ in range(TRIES):
            shape = _draw_shape(rng, alone=count == 1)
            if _is_allowed(shape, split, slot) and _fits(shape, shapes, background, must_cross):
                shapes.append(shape)
                break
        else:
            return None
    return Scene(tuple(shapes), background, relation, relation_said=crossing and chance(rng, 0.9))


def _is_allowed(shape: Shape, split: str, slot: int) -> bool:
    """Whether the shape is held out as it should be; held-out scenes have such a combination in their first shape."""
    if split == "train":
        return not _is_held_out(shape)
    return slot > 0 or _is_held_out(shape)


def _draw_background(rng: np.random.Generator) -> Background:
    is_plain = chance(rng, 0.72)
    texture = "plain" if is_plain else one_of(rng, TEXTURES[1:])
    patterned = [colour for colour in COLOURS if colour not in ("black", "white")]
    colour = choose(rng, BACKGROUND_WEIGHTS) if is_plain else one_of(rng, patterned)
    said = {"texture"} if is_plain or chance(rng, 0.9) else set()
    if is_plain or chance(rng, 0.5):
        said |= {"texture", "colour"}
    angle = int(rng.integers(4)) * math.pi / 4
    seed = int(rng.integers(2**31))
    return Background(colour, texture, angle, seed, frozenset(said) if chance(rng, 0.8) else frozenset())


def _draw_shape(rng: np.random.Generator, alone: bool) -> Shape:
    kind, colour = one_of(rng, KINDS), one_of(rng, tuple(COLOURS))
    motion = choose(rng, MOTION_WEIGHTS if alone else MOTION_WEIGHTS | {"still": 0.35})
    is_still = motion == "still"
    growth = one_of(rng, GROWTHS[1:]) if alone and chance(rng, 0.3 if is_still else 0.06) else "none"
    size = "medium" if growth != "none" else choose(rng, {"small": 1, "medium": 2, "large": 1.2 if alone else 0.4})
    is_patterned = size != "small" and growth == "none" and chance(rng, 0.2)
    shading = one_of(rng, PATTERNS if is_patterned else SHADINGS[:2])
    turns_visibly = kind not in ("circle", "ring") or shading in ("striped", "checkered")
    spin = one_of(rng, list(SPINS)[1:]) if turns_visibly and chance(rng, 0.35 if is_still else 0.15) else "none"
    radius = _draw_radius(rng, size, growth)
    start, end = _draw_path(rng, motion, max(radius), shortest=0.85 if alone else 0.6)
    turned = SPINS[spin] * rng.uniform(*TURN)
    said = _draw_said(rng, size, shading, motion, spin, growth)
    return Shape(kind, colour, size, shading, motion, spin, growth, start, end, radius, (0.0, turned), said)


def _draw_radius(rng: np.random.Generator, size: str, growth: str) -> tuple[float, float]:
    if growth != "none":
        return (SMALLEST, BIGGEST) if growth == "grows" else (BIGGEST, SMALLEST)
    radius = SIZES[size] * rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER)
    return radius, radius


def _draw_path(rng: np.random.Generator, motion: str, radius: float, shortest: float) -> tuple[Point, Point]:
    """Start and end inside the frame; a moving shape covers from `shortest` to 1 of the way that there is."""
    low = REACH * radius + MARGIN
    span = 1 - 2 * low
    path = []
    for step in STEPS[motion]:
        if step:
            travel = span * rng.uniform(shortest, 1)
            first = rng.uniform(low, low + span - travel)
            way = (first, first + travel)
            path.append(way if step > 0 else way[::-1])
        else:
            # Still shapes stay clearly at a side or in the middle.
            share = one_of(rng, (0, 0.5, 1)) + rng.uniform(-0.06, 0.06) if motion == "still" else rng.random()
            at = low + span * min(max(share, 0), 1)
            path.append((at, at))
    return tuple(zip(*path))


def _draw_said(
    rng: np.random.Generator, size: str, shading: str, motion: str, spin: str, growth: str
) -> frozenset[str]:
    """What captions mention: whatever is out of the ordinary nearly always, the rest in part."""
    is_still = motion == "still"
    is_busy = spin != "none" or growth != "none"
    probability = {
        "kind": 0.97,
        "colour": 0.97,
        "size": 0.3 if growth == "none" else 0,
        "shading": 0.9 if shading in PATTERNS else 0.12,
        "motion": 0.92 if not is_still else 0.5 if is_busy else 0.8,
        "place": 0.35 if is_still else 0,
        "growth": float(growth != "none"),
        "spin" if chance(rng, 0.75) else "spinning": float(spin != "none"),
    }
    said = {name for name, value in probability.items() if chance(rng, value)}
    return frozenset(said if said & {"kind", "colour"} else said | {"colour"})


def _fits(shape: Shape, others: Sequence[Shape], background: Background, must_cross: bool) -> bool:
    """Whether a shape stands out from the rest, and keeps apart from the others or crosses the one that it must."""
    tones = _tones(shape)
    if not stand_out(tones, background_tones(background.colour, background.texture != "plain")):
        return False
    for other in others:
        reach = REACH * (max(shape.radius) + max(other.radius))
        first, last = complex(*shape.start) - complex(*other.start), complex(*shape.end) - complex(*other.end)
        nearest = _distance_to_origin(first, last)
        if must_cross:
            # Both are whole and apart at both ends of the clip, and most of the one is behind the other between.
            is_placed = nearest < 0.3 * reach < reach < min(abs(first), abs(last)) and shape.motion != other.motion
        else:
            is_placed = nearest > 1.05 * reach
        if not (is_placed and stand_out(tones, _tones(other))):
            return False
    return True


def _tones(shape: Shape) -> tuple[Colour, ...]:
    return shape_tones(shape.colour, shape.shading in PATTERNS)


def _distance_to_origin(first: complex, last: complex) -> float:
    """How near the straight way from `first` to `last` comes to 0."""
    way = last - first
    if not way:
        return abs(first)
    time = -(first * way.conjugate()).real / abs(way) ** 2
    return abs(first + min(max(time, 0), 1) * way)
