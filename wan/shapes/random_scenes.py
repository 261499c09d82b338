"""Scenes of the `shapes` data set, drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import replace

import numpy as np

from nabla import InputError
from wan.shapes.colours import COLOURS, Colour, background_tones, shape_tones, stand_out
from wan.shapes.scenes import (
    BIGGEST,
    GROWTHS,
    KINDS,
    MOTIONS,
    PATTERNS,
    RELATIONS,
    SHADINGS,
    SIZES,
    SMALLEST,
    SPINS,
    SPLITS,
    STEPS,
    TEXTURES,
    Background,
    Point,
    Scene,
    Shape,
    chance,
    choose,
    is_held_out_shape,
    one_of,
)

# No outline reaches further from its centre than this many radii.
REACH = 1.2
MARGIN = 0.02
SIZE_JITTER = 0.06
TURN = (2.6, 3.6)  # radians in a clip: a star turns less than half its symmetry within a step of the VAE
TRIES = 60

MOTION_WEIGHTS = dict.fromkeys(MOTIONS, 0.07) | dict.fromkeys(("left", "right", "up", "down"), 0.15) | {"still": 0.12}
BACKGROUND_WEIGHTS = dict.fromkeys(COLOURS, 0.05) | {"white": 0.28, "black": 0.16, "gray": 0.1}
# How often a shape that resembles the first takes these from it; it takes all else always.
TAKEN = {"kind": 0.75, "colour": 0.5, "motion": 0.7}
# (shapes, whether the first two cross)
LAYOUTS = {(1, False): 0.6, (2, False): 0.16, (2, True): 0.13, (3, False): 0.06, (3, True): 0.05}


def sample_scene(rng: np.random.Generator, split: str = "train", alike: float = 0.0) -> Scene:
    """A random scene, the same for the same state of `rng`; most have one shape and a plain background.

    split: "train" for scenes without held-out combinations, "held_out" for scenes with at least one
    alike: the share, of scenes of several shapes that do not cross, whose shapes resemble the first
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is not known; use one of {', '.join(SPLITS)}")
    count, crossing = choose(rng, LAYOUTS)
    # Nothing more is drawn where the share is 0, so that scenes stay what they are without it.
    is_alike = alike > 0 and count > 1 and not crossing and chance(rng, alike)
    while (scene := _draw_scene(rng, count, crossing, split, is_alike)) is None:
        pass
    return scene


def unlike(rng: np.random.Generator) -> Set[str]:
    """The names of what a shape that resembles the first has of its own; all else it has from the first."""
    return {name for name, share in TAKEN.items() if not chance(rng, share)}


def resembling(first: Shape, other: Shape, own: Set[str]) -> Shape:
    """The first shape again, but with what it has of its own from the other."""
    twin = replace(first, **{name: getattr(other, name) for name in own})
    if _turns_visibly(twin.kind, twin.shading):
        return twin
    return replace(twin, spin="none", said=twin.said - {"spin", "spinning"})


def without_place(shape: Shape) -> Shape:
    return replace(shape, said=shape.said - {"place"})


def _draw_scene(rng: np.random.Generator, count: int, crossing: bool, split: str, is_alike: bool) -> Scene | None:
    """Shapes drawn one after another until each fits with those before; None if one finds no room."""
    background = _draw_background(rng)
    relation = one_of(rng, RELATIONS[1:]) if crossing else "apart"
    own = unlike(rng) if is_alike else frozenset()
    shapes: list[Shape] = []
    for slot in range(count):
        must_cross = crossing and slot == 1
        for _ in range(TRIES):
            shape = _draw_shape(rng, alone=count == 1)
            if is_alike:
                shape = _draw_twin(rng, shapes[0], shape, own) if shapes else without_place(shape)
            if (
                _is_allowed(shape, split, slot)
                and _stands_out(shape, shapes, background, is_alike)
                and _is_placed(shape, shapes, must_cross)
            ):
                shapes.append(shape)
                break
        else:
            # The scene is begun anew rather than searched on: what stands there may leave no room at all.
            return None
    return Scene(tuple(shapes), background, relation, relation_said=crossing and chance(rng, 0.9))


def _is_allowed(shape: Shape, split: str, slot: int) -> bool:
    """Whether the shape is held out as it should be; held-out scenes have such a combination in their first shape."""
    if split == "train":
        return not is_held_out_shape(shape)
    return slot > 0 or is_held_out_shape(shape)


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
    turns = _turns_visibly(kind, shading) and chance(rng, 0.35 if is_still else 0.15)
    spin = one_of(rng, list(SPINS)[1:]) if turns else "none"
    radius = _draw_radius(rng, size, growth)
    start, end = _draw_path(rng, motion, max(radius), shortest=0.85 if alone else 0.6)
    angle = _draw_angle(rng, spin)
    said = _draw_said(rng, size, shading, motion, spin, growth)
    return Shape(kind, colour, size, shading, motion, spin, growth, start, end, radius, angle, said)


def _turns_visibly(kind: str, shading: str) -> bool:
    return kind not in ("circle", "ring") or shading in ("striped", "checkered")


def _draw_twin(rng: np.random.Generator, first: Shape, other: Shape, own: Set[str]) -> Shape:
    """A shape that resembles the first, at a place of its own."""
    twin = resembling(first, other, own)
    start, end = _draw_path(rng, twin.motion, max(twin.radius), shortest=0.6)
    return replace(twin, start=start, end=end, angle=_draw_angle(rng, twin.spin))


def _draw_radius(rng: np.random.Generator, size: str, growth: str) -> tuple[float, float]:
    if growth != "none":
        return (SMALLEST, BIGGEST) if growth == "grows" else (BIGGEST, SMALLEST)
    radius = SIZES[size] * rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER)
    return radius, radius


def _draw_angle(rng: np.random.Generator, spin: str) -> tuple[float, float]:
    return 0.0, SPINS[spin] * rng.uniform(*TURN)


def _draw_path(rng: np.random.Generator, motion: str, radius: float, shortest: float) -> tuple[Point, Point]:
    """Start and end inside the frame; a moving shape covers from `shortest` to 1 of the way that there is."""
    low = REACH * radius + MARGIN
    # The outline stays within the frame, whatever its rotation.
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
        # A shape that grows has several sizes.
        "size": 0.3 if growth == "none" else 0,
        "shading": 0.9 if shading in PATTERNS else 0.12,
        "motion": 0.92 if not is_still else 0.5 if is_busy else 0.8,
        "place": 0.35 if is_still else 0,
        "growth": float(growth != "none"),
        # With the way round or without.
        "spin" if chance(rng, 0.75) else "spinning": float(spin != "none"),
    }
    said = {name for name, value in probability.items() if chance(rng, value)}
    return frozenset(said if said & {"kind", "colour"} else said | {"colour"})


def _stands_out(shape: Shape, others: Sequence[Shape], background: Background, may_share: bool) -> bool:
    """Whether a shape's colour is told from the background's and from the others', unless it may share one of those."""
    tones = _tones(shape)
    behind = background_tones(background.colour, background.texture != "plain")
    return stand_out(tones, behind) and all(
        (may_share and shape.colour == other.colour) or stand_out(tones, _tones(other)) for other in others
    )


def _is_placed(shape: Shape, others: Sequence[Shape], must_cross: bool) -> bool:
    """Whether a shape keeps apart from the others or crosses the one that it must."""
    for other in others:
        reach = REACH * (max(shape.radius) + max(other.radius))
        # Both move evenly, so one goes along a straight line as seen from the other: its place there at both ends.
        first, last = complex(*shape.start) - complex(*other.start), complex(*shape.end) - complex(*other.end)
        nearest = _distance_to_origin(first, last)
        if must_cross:
            # Both are whole and apart at both ends of the clip, and most of the one is behind the other between.
            is_placed = nearest < 0.3 * reach < reach < min(abs(first), abs(last)) and shape.motion != other.motion
        else:
            is_placed = nearest > 1.05 * reach
        if not is_placed:
            return False
    return True


def _tones(shape: Shape) -> tuple[Colour, ...]:
    return shape_tones(shape.colour, shape.shading in PATTERNS)


def _distance_to_origin(first: complex, last: complex) -> float:
    """How near the straight way from `first` to `last` comes to 0."""
    way = last - first
    if not way:
        return abs(first)
    # The foot of the perpendicular from 0, within the way.
    time = -(first * way.conjugate()).real / abs(way) ** 2
    return abs(first + min(max(time, 0), 1) * way)
