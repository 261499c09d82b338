"""What a configuration or tensors may say of a model's sizes, before anything is built of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nabla.checks import is_count, is_number

# Several times what any of the models here has; one of more would take long to build, even without memory.
MAX_LAYERS = 400
MAX_WIDTH = 2**20
MAX_LISTED = 8


def sizes_of(config: Mapping[str, object], keys: Iterable[str]) -> None:
    """Raise `ValueError` unless what a configuration has of some keys are positive integers."""
    for key in keys:
        if key in config:
            positive(key, config[key])


def positive(key: str, value: object, most: int = MAX_WIDTH) -> int:
    """A value that is a positive integer of at most `most`, else `ValueError`."""
    if not is_count(value) or value == 0:
        raise ValueError(f"{key} is {value!r}, but must be a positive integer")
    if value > most:
        raise ValueError(f"{key} is {value}, but can be at most {most}")
    return value


def fraction(key: str, value: object) -> float:
    """A value that is a number of at least 0 and below 1, else `ValueError`."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{key} is {value!r}, but must be a number of at least 0 and below 1")
    return float(value)


def each(key: str, value: object, fits: Callable[[Any], bool], length: int | None, what: str) -> None:
    """Raise `ValueError` unless a value is a list, of `length` if that is not None, of what fits, named by `what`."""
    if not isinstance(value, (list, tuple)) or not all(map(fits, value)) or len(value) > MAX_LISTED:
        raise ValueError(f"{key} is {value!r}, but must be a list of {what}")
    if length is not None and len(value) != length:
        raise ValueError(f"{key} is {value!r}, but must be {length} {what}")


def divides(key: str, value: int, of: str, whole: int) -> None:
    """Raise `ValueError` unless one size goes into another."""
    if whole % value:
        raise ValueError(f"{of} is {whole}, which is no multiple of {key}, {value}")


def check_layers(key: str, said: object, there: int) -> None:
    """Raise `ValueError` unless a configuration names as many layers as the files hold."""
    if said != there:
        raise ValueError(f"{key} is {said!r}, but its files hold {there} layers")


def numbers(names: Iterable[str], prefix: str) -> int:
    """How many layers names after a prefix count: 0, 1 and so on. Raises `ValueError` for gaps, and for too many."""
    found = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    if strange := [one for one in found if not (one.isascii() and one.isdecimal() and len(one) < 10)]:
        raise ValueError(f"a layer {prefix}{min(strange)[:60]} has no number")
    count = len(found)
    if count > MAX_LAYERS:
        raise ValueError(f"its files hold {count} layers {prefix}; the most is {MAX_LAYERS}")
    if lost := sorted(set(map(str, range(count))) - found):
        raise ValueError(f"the layer {prefix}{lost[0]} is missing, but there are {count} of other numbers")
    return count
