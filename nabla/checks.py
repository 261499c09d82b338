"""What the settings of an attention are checked by, and the error of an input that its giver can mend."""

from __future__ import annotations

import sys
from numbers import Integral, Real
from typing import TypeGuard

MAX_MESSAGE = 2000
# Of blocks, steps and layers: far beyond any, and within all integers that kernels compute with.
MAX_COUNT = 10**9


def printable(text: object) -> str:
    """Text of one line that no terminal obeys: control characters, line breaks and lone surrogates are escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text))


class InputError(ValueError):
    """An input that its giver can mend; the message is one line: the value, what is allowed, what to do.

    What a message shows of files and prompts reaches terminals and logs, so control characters in it are escaped, and
    a value of any length leaves the message short enough to read.
    """

    def __init__(self, message: str):
        # Clipped before too, since escaping takes long for what a file may hold.
        super().__init__(_clipped(printable(_clipped(message))))


def _clipped(text: str) -> str:
    half = MAX_MESSAGE // 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]} [...] {text[-half:]}"


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, 0 or more."""
    # To Python True is an integer, but YAML's `true` is no number.
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    # Not by math.isfinite, which raises for whole numbers that no float holds.
    most = sys.float_info.max
    return isinstance(value, Real) and not isinstance(value, bool) and value <= most and not value < -most
