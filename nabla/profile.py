"""A keep profile: what share of blocks each layer keeps in each stretch of a run's steps."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from nabla.checks import InputError, is_number
from nabla.shares import rounded_up

AGAIN = "scripts/calibrate_attention.py writes such files"


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of a run in which each layer keeps the same share of blocks.

    until: share of the run's steps at which it ends, in (0, 1]; the step is rounded up
    keep: of each layer the share of blocks that each row keeps, in (0, 1]; 1 is a layer that runs dense
    """

    until: float
    keep: tuple[float, ...]

    def __post_init__(self) -> None:
        if not is_number(self.until) or not 0 < self.until <= 1:
            raise InputError(f"profile until {self.until!r} is not a share of the steps in (0, 1]; the last one is 1")
        if isinstance(self.keep, str) or not isinstance(self.keep, Sequence) or not self.keep:
            raise InputError(f"profile keep {self.keep!r} is not a list of shares of blocks, one a layer")
        for layer, share in enumerate(self.keep):
            if not is_number(share) or not 0 < share <= 1:
                raise InputError(f"profile keep {share!r} of layer {layer} is outside (0, 1]; 1 runs the layer dense")
        object.__setattr__(self, "until", float(self.until))
        object.__setattr__(self, "keep", tuple(map(float, self.keep)))

    @property
    def is_dense(self) -> bool:
        return all(share == 1 for share in self.keep)


@dataclass(frozen=True)
class KeepProfile:
    """Stretches of a run in their order, the last one until its end; of all the same number of layers.

    measured_on: what it was measured with, as plain values; its `layers`, if there, are the transformer's
    """

    stretches: tuple[Stretch, ...]
    # Left out of the hash, which a mapping does not have.
    measured_on: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        stretches = tuple(self.stretches)
        object.__setattr__(self, "stretches", stretches)
        if not stretches or not all(isinstance(one, Stretch) for one in stretches):
            raise InputError("profile has no stretches; give at least one, until 1")
        ends = [one.until for one in stretches]
        if any(end >= later for end, later in zip(ends, ends[1:])):
            raise InputError(f"profile stretches until {_listed(ends)} do not rise; put them in the order of the steps")
        if ends[-1] != 1:
            raise InputError(f"profile's last stretch is until {ends[-1]:g}, and has to be until 1, the run's end")
        counts = [len(one.keep) for one in stretches]
        if len(set(counts)) > 1:
            raise InputError(f"profile stretches have {_listed(counts)} layers; give each a share of every layer")
        self._check_measured_on()

    def _check_measured_on(self) -> None:
        on = self.measured_on
        if on is None:
            return
        if not isinstance(on, Mapping):
            raise InputError(f"profile measured_on {on!r} is not a mapping of what it holds for")
        if on.get("layers", self.layers) != self.layers:
            raise InputError(
                f"profile was measured on {on['layers']!r} layers and says {self.layers} shares; measure it anew"
            )

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> KeepProfile:
        """From plain values, as `to_dict` gives them; raises `InputError` for others."""
        _check_keys("profile", given, {item.name for item in fields(cls)}, "stretches")
        stretches = given["stretches"]
        if not isinstance(stretches, (list, tuple)):
            raise InputError(f"profile stretches {stretches!r} is not a list of mappings, each with until and keep")
        return cls(tuple(map(_stretch, stretches)), given.get("measured_on"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back to an equal profile."""
        plain: dict[str, Any] = {"stretches": [{"until": s.until, "keep": list(s.keep)} for s in self.stretches]}
        return plain if self.measured_on is None else plain | {"measured_on": dict(self.measured_on)}

    @property
    def layers(self) -> int:
        return len(self.stretches[0].keep)

    @property
    def name(self) -> str:
        """Short, and another one for other shares: `profile-1f0c2a9b`."""
        told = repr([(one.until, one.keep) for one in self.stretches])
        return f"profile-{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    @property
    def mean_keep(self) -> float:
        """The share of blocks over all layers and steps."""
        begins = [0.0, *(one.until for one in self.stretches)]
        spans = [one.until - begin for one, begin in zip(self.stretches, begins)]
        return sum(span * sum(one.keep) / self.layers for span, one in zip(spans, self.stretches))

    def stretch_at(self, step: int, steps: int | None) -> Stretch:
        """The stretch of a step, counted from 0, of so many; raises `InputError` where it takes their number to know.

        Steps past the end are of the last one.
        """
        if len(self.stretches) == 1:
            return self.stretches[0]
        if steps is None:
            raise InputError(
                f"profile of {len(self.stretches)} stretches needs to know how many steps a run has, and nothing here "
                "says it; sample with a pipeline of wan, which does, or give a profile of one stretch"
            )
        return next((one for one in self.stretches if step < rounded_up(one.until, steps)), self.stretches[-1])

    def dense_step_count(self, steps: int | None) -> int:
        """How many first steps run dense in all layers."""
        if not steps:
            return 0
        begin = 0
        for one in self.stretches:
            # By stretches rather than steps, of which there may be any number: one too short for a step says nothing.
            end = rounded_up(one.until, steps)
            if end > begin and not one.is_dense:
                return begin
            begin = max(begin, end)
        return begin

    def check_layers(self, layers: int) -> None:
        """Raise `InputError` for a transformer of another number of layers."""
        if layers != self.layers:
            model = (self.measured_on or {}).get("checkpoint")
            of = f", those of {model}" if isinstance(model, str) else ""
            raise InputError(
                f"profile has shares of {self.layers} layers{of}, and this transformer has {layers}; "
                f"give one for it: {AGAIN}"
            )

    def describe(self) -> str:
        """A few words: how much it keeps, and of what."""
        stretches = f"{len(self.stretches)} stretch{'es' if len(self.stretches) > 1 else ''} of steps"
        return f"{self.layers} layers, {stretches}, {self.mean_keep:.1%} of blocks in the mean"


def is_profile_name(algorithm: str) -> bool:
    """Whether an algorithm is written by the name of a profile, which says it to people alone."""
    return re.match(r"profile-[0-9a-f]{8}(_|$)", algorithm) is not None


def _stretch(given: object) -> Stretch:
    if not isinstance(given, Mapping):
        raise InputError(f"profile stretch {given!r} is not a mapping with until and keep")
    _check_keys("profile stretch", given, {"until", "keep"}, "until", "keep")
    return Stretch(given["until"], given["keep"])


def _check_keys(what: str, given: object, known: set[str], *needed: str) -> None:
    if not isinstance(given, Mapping):
        raise InputError(f"{what} {given!r} is not a mapping with {' and '.join(needed)}; {AGAIN}")
    if unknown := sorted(map(str, given.keys() - known)):
        raise InputError(f"{what} has an unknown key {unknown[0]!r}; allowed are {', '.join(sorted(known))}")
    if missing := [name for name in needed if given.get(name) is None]:
        raise InputError(f"{what} has no {missing[0]}; {AGAIN}")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
