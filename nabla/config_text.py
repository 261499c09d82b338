"""Algorithm strings, such as `nabla-0.6_sta-11-3-3`: what a sparse attention is called on a command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from nabla.checks import InputError


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("-")))


# Of the parts of an algorithm string: the field, how its value is written, and how it is read. Numbers may have
# exponents, since `written` has small ones so; nine digits of a size stay below `MAX_COUNT`.
_SHARE, _SIZES = r"(\d*\.?\d+(?:e-?\d+)?)", r"(\d{1,9}-\d{1,9}-\d{1,9})"
_PARTS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "nabla": ("threshold", _SHARE, float),
    "keep": ("keep", _SHARE, float),
    "min": ("keep_min", _SHARE, float),
    "max": ("keep_max", _SHARE, float),
    "pool": ("pool", _SIZES, _sizes),
    "dropped": ("dropped", r"([a-z]+)", str),
    "sta": ("window", _SIZES, _sizes),
}


def written(values: dict[str, Any]) -> list[str]:
    """The parts of the string that `read` gives these values for."""
    return [f"{head}-{_spelled(values[field])}" for head, (field, _, _) in _PARTS.items() if field in values]


def _spelled(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read(algorithm: object) -> dict[str, Any]:
    """The settings that a string says, by field; raises `InputError` for one that is not known."""
    values: dict[str, Any] = {}
    for part in [] if algorithm == "dense" else str(algorithm).split("_"):
        name, value = _read_part(part)
        # A threshold and a share are two forms of one choice.
        if name is None or name in values or {name, *values} >= {"threshold", "keep"}:
            raise InputError(
                f"attention algorithm {algorithm!r} is not known; use dense, nabla-0.7, keep-0.2, sta-11-3-3 "
                "or nabla-0.6_sta-11-3-3 (threshold; share of blocks; window in blocks of frames, rows, columns), and "
                "after a threshold or share _pool-1-4-4, _dropped-mean, and of a threshold _min-0.05, _max-0.3"
            )
        values[name] = value
    return values


def _read_part(part: str) -> tuple[str | None, Any]:
    """The field that a part of an algorithm string is for, and its value; no field for what is no such part."""
    head, _, rest = part.partition("-")
    name, spelling, reader = _PARTS.get(head, (None, "", str))
    value = re.fullmatch(spelling, rest, re.ASCII)
    return (name, reader(value[1])) if name is not None and value else (None, None)
