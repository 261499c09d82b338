"""What captions say, as class numbers: targets from which a text encoder learns to read sentences."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wan.shapes.colours import COLOURS
from wan.shapes.scenes import (
    GROWTHS,
    KINDS,
    MOTIONS,
    PLACES,
    RELATIONS,
    SHADINGS,
    SIZES,
    SPINS,
    TEXTURES,
    Scene,
    Shape,
)

NOT_SAID = "not said"
MOST_SHAPES = 3
SHAPE_CLASSES: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "shading": SHADINGS,
    "motion": MOTIONS,
    "place": PLACES,
    "spin": (*SPINS, "either way"),
    "growth": GROWTHS,
}
# Every attribute's name and classes, in the order of the targets; class 0 is `NOT_SAID` throughout.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    f"shape {slot} {name}": (NOT_SAID, *classes)
    for slot in range(1, MOST_SHAPES + 1)
    for name, classes in SHAPE_CLASSES.items()
} | {
    "shapes": (NOT_SAID, *map(str, range(1, MOST_SHAPES + 1))),
    "background colour": (NOT_SAID, *COLOURS),
    "background texture": (NOT_SAID, *TEXTURES),
    "relation": (NOT_SAID, *RELATIONS),
}
NUMBER_OF = {name: number for number, name in enumerate(ATTRIBUTES)}


def said(scene: Scene) -> dict[str, str]:
    """Names of `ATTRIBUTES` and the classes that the scene's captions name, without those that they do not.

    Shapes count in the order in which a caption mentions them; the relation is the first's to the second.
    """
    named = {"shapes": str(len(scene.shapes))}
    for slot, shape in enumerate(scene.shapes, start=1):
        named |= {f"shape {slot} {name}": value for name, value in said_of(shape).items()}
    named |= {f"background {name}": getattr(scene.background, name) for name in scene.background.said}
    if scene.relation_said:
        named["relation"] = scene.relation
    return named


def said_of(shape: Shape) -> dict[str, str]:
    """The attributes of a shape that captions name, and their classes."""
    named = {name: getattr(shape, name) for name in shape.said - {"spinning"}}
    return named | ({"spin": "either way"} if "spinning" in shape.said else {})


def said_of_shapes(named: Mapping[str, str]) -> list[dict[str, str]]:
    """Of each shape, in order, its attributes among those that `said` gives, and their classes."""
    names = [(name, f"shape {{}} {name}") for name in SHAPE_CLASSES]
    slots = range(1, int(named.get("shapes", 0)) + 1)
    return [{name: named[key.format(slot)] for name, key in names if key.format(slot) in named} for slot in slots]


def attributes(scene: Scene) -> Tensor:
    """Class numbers of what captions of the scene say, (len(ATTRIBUTES),) int64."""
    return numbers(said(scene))


def numbers(named: Mapping[str, str]) -> Tensor:
    """Class numbers, (len(ATTRIBUTES),) int64, of attributes and classes as `said` gives them.

    Raises `KeyError` for an attribute, and `ValueError` for a class, that there is not.
    """
    # What is not named stays `NOT_SAID`.
    target = torch.zeros(len(ATTRIBUTES), dtype=torch.int64)
    for name, value in named.items():
        target[NUMBER_OF[name]] = ATTRIBUTES[name].index(value)
    return target
