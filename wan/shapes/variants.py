"""Scenes that are told but never drawn: they teach what people ask for and pictures of the data set do not show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from wan.shapes.random_scenes import resembling, unlike, without_place
from wan.shapes.scenes import Scene, Shape, chance

TWIN_SHARE, SHORT_SHARE = 0.25, 0.15


def variant(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene, or one like it whose shapes resemble each other, or of which less is said."""
    if len(scene.shapes) > 1 and not scene.relation_said and chance(rng, TWIN_SHARE):
        scene = _with_twins(scene, rng)
    return _shortened(scene, rng) if chance(rng, SHORT_SHARE) else scene


def _with_twins(scene: Scene, rng: np.random.Generator) -> Scene:
    first, *others = scene.shapes
    first, own = without_place(first), unlike(rng)
    return replace(scene, shapes=(first, *(resembling(first, other, own) for other in others)))


def _shortened(scene: Scene, rng: np.random.Generator) -> Scene:
    """Kinds and colours stay, or kinds alone; of the rest, little is said."""
    dropped = {
        name for name in ("motion", "size", "shading", "place", "spin", "spinning", "growth") if chance(rng, 0.6)
    }
    shapes = tuple(_saying_less(shape, dropped) for shape in scene.shapes)
    if all("kind" in shape.said for shape in shapes) and chance(rng, 0.15):
        shapes = tuple(_saying_less(shape, {"colour"}) for shape in shapes)
    background = replace(scene.background, said=frozenset()) if chance(rng, 0.6) else scene.background
    return replace(scene, shapes=shapes, background=background)


def _saying_less(shape: Shape, dropped: set[str]) -> Shape:
    return replace(shape, said=shape.said - dropped)
