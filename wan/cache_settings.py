"""How a run reuses what blocks computed in earlier steps: the `cache` of the settings, and `--cache`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nabla import InputError
from nabla.config import is_count, is_number

# Thresholds that diffusers sets by default; not measured on Wan.
THRESHOLDS = {"first_block": 0.05, "mag": 0.06}
OFF = (None, False, "none")
# Of the hidden states, that both guidance branches keep.
COPIES = {"first_block": 6, "mag": 4}


@dataclass(frozen=True)
class CacheSettings:
    """One of diffusers' step caches.

    kind: `first_block` computes the first block of every forward, and reuses what the others added when it was last
        computed while the first one's own addition changed by less than the threshold, relatively; `mag` is MagCache
        (arXiv 2506.09045), which knows from ratios measured beforehand how much additions change from step to step, and
        reuses them while the error that these predict is below the threshold
    threshold: 0 never reuses; None takes that of `THRESHOLDS`
    warmup: the share of a video's steps, from its first, that are computed in any case; dense steps always are
    max_skips: after so many forwards of a guidance branch that reuse, one is computed
    ratios: of `mag`, a number a step, or the file that scripts/calibrate_cache.py writes; for another number of steps
        the nearest are taken
    """

    kind: str
    threshold: float | None = None
    warmup: float = 0.2
    max_skips: int = 3
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in THRESHOLDS:
            raise InputError(f"cache {self.kind!r} is not known; use one of none, {', '.join(THRESHOLDS)}")
        if self.threshold is None:
            object.__setattr__(self, "threshold", THRESHOLDS[self.kind])
        if not is_number(self.threshold) or self.threshold < 0:
            raise InputError(f"cache threshold {self.threshold!r} is not a number of at least 0 (0 never reuses)")
        if not is_number(self.warmup) or not 0 <= self.warmup <= 1:
            raise InputError(f"cache warmup {self.warmup!r} is not a share of the steps from 0 to 1; 0.2 is usual")
        if not is_count(self.max_skips):
            raise InputError(f"cache max_skips {self.max_skips!r} is not a whole number of steps; 3 is usual")
        object.__setattr__(self, "ratios", _ratios(self.ratios))
        if (self.kind == "mag") != (self.ratios is not None):
            raise InputError(
                "cache mag needs the ratios of the checkpoint; measure them with scripts/calibrate_cache.py"
                if self.kind == "mag"
                else f"cache {self.kind} has no use for ratios; leave them out"
            )

    @classmethod
    def parse(cls, given: object, ratios: Sequence[float] | None = None) -> CacheSettings | None:
        """From `none`, `kind`, `kind:threshold`, `mag:threshold:ratios.json`, or a mapping; None where it is off.

        ratios: for a string that names no file of them
        """
        if given in OFF or isinstance(given, cls):
            return given if isinstance(given, cls) else None
        if isinstance(given, Mapping):
            allowed = [item.name for item in fields(cls)]
            if unknown := sorted(map(str, given.keys() - set(allowed))):
                raise InputError(f"cache has an unknown key {unknown[0]!r}; allowed are {', '.join(allowed)}")
            return cls(**{"kind": None, **given})
        if not isinstance(given, str):
            raise InputError(f"cache {given!r} is neither none, nor kind:threshold, nor a mapping of settings")
        kind, _, rest = given.partition(":")
        threshold, _, file = rest.partition(":")
        try:
            number = float(threshold) if threshold else None
        except ValueError:
            raise InputError(f"cache {given!r}: {threshold!r} is not a number; write kind:threshold[:file]") from None
        return cls(kind, number, ratios=file or ratios)

    def describe(self) -> str:
        return f"{self.kind}, threshold {self.threshold}"


def _ratios(given: Any) -> tuple[float, ...] | None:
    """Ratios given as numbers, or as the path of a file that holds them."""
    if isinstance(given, str):
        path = Path(os.path.expanduser(given))
        try:
            given = json.loads(path.read_text(encoding="utf-8"))["ratios"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"cache ratios {path} cannot be read: {' '.join(str(error).split())}") from None
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) or not given or not all(is_number(n) and n > 0 for n in given):
        raise InputError(f"cache ratios {given!r} are not positive numbers, one a step")
    return tuple(float(n) for n in given)
