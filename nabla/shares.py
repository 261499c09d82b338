"""Shares of a run's steps and of a transformer's layers, and the whole numbers that they come to."""

from __future__ import annotations

import math
from typing import TypeGuard

from nabla.checks import MAX_COUNT, InputError, is_count, is_number

# In binary 0.07 of 100 is a little more than 7; no share that is meant is that near to a whole number.
_ROUNDING = 1e-9


def rounded_up(share: float, total: int) -> int:
    """The least whole number that is at least a share of `total`; one exact up to rounding is exact."""
    return math.ceil(share * total - _ROUNDING)


def is_share(value: object) -> TypeGuard[float]:
    """Whether a value is a share below 1 of a whole, and not a count: 0.2, but neither 0 nor 1."""
    return is_number(value) and 0 < value < 1


def checked_steps(given: object) -> int | float:
    """`dense_steps` as it is kept: a whole number of steps, or a share of them below 1."""
    # A control of shares says none by 0.0; of other floats that are whole, 1.0 could be meant as one step or as all.
    if is_number(given) and given == 0:
        return 0
    if not is_share(given) and not (is_count(given) and given <= MAX_COUNT):
        raise InputError(
            f"dense_steps {given!r}: give a whole number of sampling steps, 0 or more, or a share of them below 1"
        )
    return given


def checked_layers(given: object) -> tuple[int, ...] | float:
    """`dense_layers` as it is kept: numbers in order, or a share of the layers below 1."""
    if is_share(given):
        return float(given)
    if not isinstance(given, (list, tuple, range)) or not all(is_count(one) and one <= MAX_COUNT for one in given):
        raise InputError(
            f"dense_layers {given!r}: give a list of layer numbers, counted from 0, "
            "or a share of the layers below 1, the first ones"
        )
    return tuple(sorted(set(given)))


def step_count(steps: int | float, total: int | None) -> int:
    """How many first steps `dense_steps` are of `total`; raises `InputError` for a share where that is not known."""
    if not is_share(steps):
        return int(steps)
    if total is None:
        raise InputError(
            f"dense_steps {steps} is a share of a run's steps, and nothing here says how many these are; "
            "give a whole number of steps, or sample with a pipeline of wan, which says it"
        )
    return rounded_up(steps, total)


def layer_numbers(layers: tuple[int, ...] | float, total: int) -> tuple[int, ...]:
    """Which of `total` layers `dense_layers` are; raises `InputError` for one that does not exist."""
    if isinstance(layers, float):
        return tuple(range(rounded_up(layers, total)))
    if layers and layers[-1] >= total:
        raise InputError(f"dense_layers {layers[-1]} does not exist; layers are 0 to {total - 1}")
    return layers


def described_steps(steps: int | float) -> str:
    """The first steps that run dense, in a few words; empty where there are none."""
    if not steps:
        return ""
    return f"first {steps:.4g} of the steps dense" if is_share(steps) else f"first {steps} steps dense"


def described_layers(layers: tuple[int, ...] | float) -> str:
    """The layers that run dense, in a few words; empty where there are none."""
    if isinstance(layers, float):
        return f"first {layers:.4g} of the layers dense"
    return f"layers {', '.join(map(str, layers))} dense" if layers else ""
