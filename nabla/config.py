"""What to attend to: the settings of one sparse attention, and how they are written in YAML and on a command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

BACKEND_NAMES = ("auto", "flex", "reference")


class InputError(ValueError):
    """An input that its giver can mend; the message is one line: the value, what is allowed, what to do."""


@dataclass(frozen=True)
class NablaConfig:
    """One sparse attention. With neither `threshold`, `keep` nor `window` it is dense attention.

    threshold: share of each query block's probability that the kept key blocks must reach, in (0, 1]
    keep: instead of a threshold, the share of key blocks kept in every row, in (0, 1]
    window: (frames, rows, columns) in blocks; every block within half of it on each axis is kept too
    tile: (frames, rows, columns) of tokens that make one block
    dense_steps: how many sampling steps run dense before the sparse ones
    dense_layers: transformer layers that always run dense, counted from 0
    backend: the kernel, one of `BACKEND_NAMES`
    """

    threshold: float | None = None
    window: tuple[int, int, int] | None = None
    tile: tuple[int, int, int] = (1, 8, 8)
    keep: float | None = None
    dense_steps: int = 0
    dense_layers: tuple[int, ...] = ()
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.threshold is not None and self.keep is not None:
            raise InputError(f"threshold {self.threshold} and keep {self.keep} are alternatives; give one of them")
        for name in ("threshold", "keep"):
            _check_share(name, getattr(self, name))
        if self.window is not None:
            object.__setattr__(self, "window", _three_positive("window", self.window))
        object.__setattr__(self, "tile", _three_positive("tile", self.tile))
        if not _is_count(self.dense_steps):
            raise InputError(f"dense_steps {self.dense_steps!r}: give a whole number of sampling steps, 0 or more")
        if isinstance(self.dense_layers, str) or not all(_is_count(n) for n in _items(self.dense_layers)):
            raise InputError(f"dense_layers {self.dense_layers!r}: give a list of layer numbers, counted from 0")
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))
        if self.backend not in BACKEND_NAMES:
            raise InputError(f"backend {self.backend!r} is not known; use one of {', '.join(BACKEND_NAMES)}")

    @property
    def block(self) -> int:
        """Tokens in a full block."""
        return math.prod(self.tile)

    @property
    def selects(self) -> bool:
        """Whether blocks are chosen from the content of q and k."""
        return self.threshold is not None or self.keep is not None

    @property
    def is_dense(self) -> bool:
        return not self.selects and self.window is None

    @property
    def algorithm(self) -> str:
        """The string that `parse` reads, such as `nabla-0.6_sta-11-3-3`."""
        parts = [f"nabla-{self.threshold}"] if self.threshold is not None else []
        parts += [f"keep-{self.keep}"] if self.keep is not None else []
        parts += ["sta-" + "-".join(map(str, self.window))] if self.window is not None else []
        return "_".join(parts) or "dense"

    @classmethod
    def parse(cls, algorithm: str) -> NablaConfig:
        """Read an algorithm string: `dense`, `nabla-0.7`, `sta-11-3-3`, `nabla-0.6_sta-11-3-3`, `keep-0.2`.

        Window sizes are in blocks. Raises `InputError` for any other string.
        """
        if algorithm == "dense":
            return cls()
        settings: dict[str, Any] = {}
        for part in str(algorithm).split("_"):
            share = re.fullmatch(r"(nabla|keep)-(\d*\.?\d+(?:e-?\d+)?)", part)
            window = re.fullmatch(r"sta-(\d+)-(\d+)-(\d+)", part)
            if share:
                name, value = {"nabla": "threshold", "keep": "keep"}[share[1]], float(share[2])
            elif window:
                name, value = "window", tuple(map(int, window.groups()))
            else:
                name, value = "", None
            if not name or name in settings:
                raise InputError(
                    f"attention algorithm {algorithm!r} is not known; use dense, nabla-0.7, sta-11-3-3 "
                    "or nabla-0.6_sta-11-3-3 (threshold; window in blocks of frames, rows, columns)"
                )
            settings[name] = value
        return cls(**settings)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> NablaConfig:
        """Build from the `attention` mapping of a YAML file.

        `algorithm` is a string for `parse`, or one of the bare names dense, nabla, sta and nabla_sta, whose numbers
        then stand in `threshold` (or `keep`) and `window`. Raises `InputError` for unknown, missing or unused keys.
        """
        settings = dict(settings)
        known = {field.name for field in fields(cls)} | {"algorithm"}
        if unknown := sorted(set(settings) - known):
            raise InputError(f"attention has an unknown key {unknown[0]!r}; allowed are {', '.join(sorted(known))}")
        algorithm = settings.pop("algorithm", None)
        numbers = {key for key in ("threshold", "keep", "window") if settings.get(key) is not None}
        if algorithm in _BARE_NAMES:
            wanted = _BARE_NAMES[algorithm]
            given = {"threshold" if key == "keep" else key for key in numbers}
            if given != wanted:
                raise InputError(
                    f"attention algorithm {algorithm!r} takes {' and '.join(sorted(wanted)) or 'no threshold or window'}"
                    f", but given are {', '.join(sorted(numbers)) or 'none'}"
                )
            return cls(**settings)
        if algorithm is None:
            return cls(**settings)
        if numbers:
            raise InputError(
                f"attention algorithm {algorithm!r} already carries its numbers; remove {', '.join(sorted(numbers))} "
                f"or use one of the bare names {', '.join(_BARE_NAMES)}"
            )
        base = cls.parse(algorithm)
        rest = {key: value for key, value in settings.items() if key not in ("threshold", "keep", "window")}
        return replace(base, **rest)


_BARE_NAMES = {"dense": set(), "nabla": {"threshold"}, "sta": {"window"}, "nabla_sta": {"threshold", "window"}}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _items(value: object) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)


def _check_share(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise InputError(f"{name} {value!r} is outside (0, 1]; 1 keeps every block, smaller values keep fewer")


def _three_positive(name: str, value: object) -> tuple[int, int, int]:
    numbers = _items(value)
    if len(numbers) != 3 or not all(_is_count(n) and n > 0 for n in numbers):
        raise InputError(f"{name} {value!r} is not three positive integers (frames, rows, columns)")
    return numbers
