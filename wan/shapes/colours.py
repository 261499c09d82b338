"""The palette of the `shapes` data set, the tones made of it, and which of them stand out from which.

Colours are RGB in 8-bit levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Colour = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (222, 42, 42),
    "green": (40, 160, 65),
    "blue": (40, 90, 225),
    "yellow": (252, 215, 45),
    "orange": (247, 135, 20),
    "purple": (135, 55, 185),
    "pink": (252, 135, 190),
    "cyan": (45, 205, 222),
    "brown": (125, 75, 40),
    "gray": (128, 128, 128),
    "black": (8, 8, 8),
    "white": (255, 255, 255),
}
# How far tones go from a colour: shading darkens and lights up, patterns and textured backgrounds alternate.
SHADE, GLOW, PATTERN, TEXTURE = 0.24, 0.36, 0.36, 0.35
LEAST_CONTRAST = 66.0


def mix(colour: Colour, level: float, share: float) -> Colour:
    """A colour moved by `share` of the way towards the gray of `level`."""
    return tuple(value + (level - value) * share for value in colour)


def pattern_tone(colour: str) -> Colour:
    """The second tone of patterned shapes: lighter for dark colours, darker for light ones."""
    base = COLOURS[colour]
    return mix(base, 255 if sum(base) < 450 else 0, PATTERN)


def texture_tone(colour: str) -> Colour:
    """The second tone of textured backgrounds."""
    return mix(COLOURS[colour], 255, TEXTURE)


def shape_tones(colour: str, is_patterned: bool) -> tuple[Colour, ...]:
    return (COLOURS[colour], pattern_tone(colour)) if is_patterned else (COLOURS[colour],)


def background_tones(colour: str, is_textured: bool) -> tuple[Colour, ...]:
    """A background's tones and some of those that its gradients and clouds have in between."""
    # Five tones, from the colour to `texture_tone`.
    return tuple(mix(COLOURS[colour], 255, TEXTURE * step / 4) for step in range(5 if is_textured else 1))


def stand_out(tones: Sequence[Colour], others: Sequence[Colour]) -> bool:
    """Whether no tone comes near any of the others."""
    return min(math.dist(tone, other) for tone in tones for other in others) >= LEAST_CONTRAST
