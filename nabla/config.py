"""What to attend to: the settings of one sparse attention, and how they are written in YAML and on a command line."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypeGuard

BACKEND_NAMES = ("auto", "cudnn", "flex", "gather", "reference")
KINDS = ("dense", "nabla", "sta", "nabla_sta")
MAX_BLOCK = 1024
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


@dataclass(frozen=True)
class NablaConfig:
    """One sparse attention. With neither `threshold`, `keep` nor `window` it is dense attention.

    threshold: share of each query block's probability that the kept key blocks must reach, in (0, 1]
    keep: instead of a threshold, the density of every row, the share of key blocks that it keeps, in (0, 1]
    window: (frames, rows, columns) in blocks; every block within half of it on each axis is kept too
    tile: (frames, rows, columns) of tokens that make one block
    dense_steps: how many sampling steps run dense before the sparse ones
    dense_layers: transformer layers that always run dense, counted from 0
    mask_refresh: sampling steps for which a layer keeps the blocks that it chose, for both guidance branches
    backend: the kernel, one of `BACKEND_NAMES`
    """

    threshold: float | None = None
    window: tuple[int, int, int] | None = None
    tile: tuple[int, int, int] = (1, 8, 8)
    keep: float | None = None
    dense_steps: int = 0
    dense_layers: tuple[int, ...] = ()
    mask_refresh: int = 1
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.threshold is not None and self.keep is not None:
            raise InputError(f"threshold {self.threshold} and keep {self.keep} are alternatives; give one of them")
        for name in ("threshold", "keep"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value <= 1):
                raise InputError(f"{name} {value!r} is outside (0, 1]; 1 keeps every block, smaller values keep fewer")
        # By this, since the class is frozen. A YAML file's lists become tuples, which compare and hash as others do.
        if self.window is not None:
            object.__setattr__(self, "window", _three_positive("window", self.window))
        object.__setattr__(self, "tile", _three_positive("tile", self.tile))
        if self.block > MAX_BLOCK:
            raise InputError(
                f"tile {self.tile} holds {self.block} tokens; at most {MAX_BLOCK} are allowed, 64 are usual"
            )
        if not is_count(self.dense_steps) or self.dense_steps > MAX_COUNT:
            raise InputError(f"dense_steps {self.dense_steps!r}: give a whole number of sampling steps, 0 or more")
        if not is_count(self.mask_refresh) or not 1 <= self.mask_refresh <= MAX_COUNT:
            raise InputError(f"mask_refresh {self.mask_refresh!r}: give a whole number of sampling steps, 1 or more")
        if self.mask_refresh > 1 and not self.selects:
            raise InputError(f"mask_refresh {self.mask_refresh} has no use for {self.kind}, whose blocks do not change")
        layers = self.dense_layers
        if not isinstance(layers, (list, tuple, range)) or not all(
            is_count(layer) and layer <= MAX_COUNT for layer in layers
        ):
            raise InputError(f"dense_layers {layers!r}: give a list of layer numbers, counted from 0")
        object.__setattr__(self, "dense_layers", tuple(sorted(set(layers))))
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
    def kind(self) -> str:
        """One of `KINDS`: what the blocks are kept by."""
        return "_".join(["nabla"] * self.selects + ["sta"] * (self.window is not None)) or "dense"

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
        numbers: dict[str, Any] = {}
        for part in [] if algorithm == "dense" else str(algorithm).split("_"):
            # With exponents, since `algorithm` writes small numbers so. Nine digits of a window stay below `MAX_COUNT`.
            rule = re.fullmatch(r"(nabla|keep)-(\d*\.?\d+(?:e-?\d+)?)", part, re.ASCII)
            window = re.fullmatch(r"sta-(\d{1,9})-(\d{1,9})-(\d{1,9})", part, re.ASCII)
            if rule and not numbers:
                numbers["threshold" if rule[1] == "nabla" else "keep"] = float(rule[2])
            elif window and "window" not in numbers:
                numbers["window"] = tuple(map(int, window.groups()))
            else:
                raise InputError(
                    f"attention algorithm {algorithm!r} is not known; use dense, nabla-0.7, sta-11-3-3 "
                    "or nabla-0.6_sta-11-3-3 (threshold; window in blocks of frames, rows, columns)"
                )
        return cls(**numbers)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> NablaConfig:
        """Build from the `attention` mapping of a YAML file.

        Its `algorithm` is a string for `parse`, or one of `KINDS`, whose numbers then stand in `threshold` (or `keep`)
        and `window`. Raises `InputError` for keys that are unknown, missing, or not used by the algorithm.
        """
        # A key with nothing behind it is None in YAML, and is as if it were not there.
        settings = {key: value for key, value in settings.items() if value is not None}
        known = {field.name for field in fields(cls)} | {"algorithm"}
        if unknown := sorted(map(str, settings.keys() - known)):
            raise InputError(f"attention has an unknown key {unknown[0]!r}; allowed are {', '.join(sorted(known))}")
        algorithm = settings.pop("algorithm", None)
        # Before the numbers that a string carries are there, there is nothing to refresh.
        refresh = 1 if algorithm in (None, *KINDS) else settings.pop("mask_refresh", 1)
        given = cls(**settings)
        if algorithm is None or algorithm == given.kind:
            return given
        if algorithm in KINDS:
            raise InputError(
                f"attention algorithm {algorithm!r} takes {_NUMBERS[algorithm]}, but given are {_NUMBERS[given.kind]}"
            )
        named = cls.parse(algorithm)
        if not given.is_dense:
            raise InputError(
                f"attention algorithm {algorithm!r} carries its numbers already; remove {_NUMBERS[given.kind]}, "
                f"or name it by one of {', '.join(KINDS)}"
            )
        return replace(given, threshold=named.threshold, keep=named.keep, window=named.window, mask_refresh=refresh)


_NUMBERS = {
    "dense": "no threshold and no window",
    "nabla": "a threshold (or keep)",
    "sta": "a window",
    "nabla_sta": "a threshold (or keep) and a window",
}


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, 0 or more."""
    # To Python True is an integer, but YAML's `true` is no number.
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    # Not by math.isfinite, which raises for whole numbers that no float holds.
    most = sys.float_info.max
    return isinstance(value, Real) and not isinstance(value, bool) and value <= most and not value < -most


def _three_positive(name: str, value: object) -> tuple[int, int, int]:
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 3
        or not all(is_count(n) and 0 < n <= MAX_COUNT for n in value)
    ):
        raise InputError(f"{name} {value!r} is not three positive integers (frames, rows, columns)")
    frames, rows, columns = map(int, value)
    return frames, rows, columns
