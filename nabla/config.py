"""What to attend to: the settings of one sparse attention, and how they are written in YAML and on a command line."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypeGuard

BACKEND_NAMES = ("auto", "cudnn", "flex", "gather", "reference")
KINDS = ("dense", "nabla", "sta", "nabla_sta")
DROPPED = ("none", "mean")
# What an algorithm string says, so that no other setting says it again.
CHOICE = ("threshold", "keep", "keep_min", "keep_max", "window", "pool", "dropped")
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
    pool: (frames, rows, columns) of tokens that are averaged into one before blocks are chosen; divides the tile, which
        it is by default (None)
    keep_min, keep_max: least and greatest share of key blocks that a row keeps by a threshold, in (0, 1]
    dropped: what stands for the blocks that are not kept: "none", or their "mean" keys and values
    dense_steps: how many sampling steps run dense before the sparse ones
    dense_layers: transformer layers that always run dense, counted from 0
    mask_refresh: sampling steps for which a layer keeps the blocks that it chose, for both guidance branches
    backend: the kernel, one of `BACKEND_NAMES`
    """

    threshold: float | None = None
    window: tuple[int, int, int] | None = None
    tile: tuple[int, int, int] = (1, 8, 8)
    keep: float | None = None
    pool: tuple[int, int, int] | None = None
    keep_min: float | None = None
    keep_max: float | None = None
    dropped: str = "none"
    dense_steps: int = 0
    dense_layers: tuple[int, ...] = ()
    mask_refresh: int = 1
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.threshold is not None and self.keep is not None:
            raise InputError(f"threshold {self.threshold} and keep {self.keep} are alternatives; give one of them")
        for name in ("threshold", "keep", "keep_min", "keep_max"):
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
        self._check_pool()
        self._check_limits()
        if self.dropped not in DROPPED:
            raise InputError(f"dropped {self.dropped!r} is not known; use one of {', '.join(DROPPED)}")
        if self.dropped != "none" and self.is_dense:
            raise InputError(f"dropped {self.dropped!r} has no use for dense attention, which drops no block")
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

    def _check_pool(self) -> None:
        if self.pool is None:
            return
        pool = _three_positive("pool", self.pool)
        if any(tokens % part for tokens, part in zip(self.tile, pool)):
            raise InputError(f"pool {pool} does not divide tile {self.tile}; (1, 4, 4) makes four parts of (1, 8, 8)")
        if not self.selects:
            raise InputError(f"pool {pool} has no use for {self.kind}, whose blocks are not chosen from the content")
        # One part a tile is one setting, however it is written.
        object.__setattr__(self, "pool", None if pool == self.tile else pool)

    def _check_limits(self) -> None:
        least, most = self.keep_min, self.keep_max
        if (least, most) != (None, None) and self.threshold is None:
            raise InputError(
                f"keep_min {least} and keep_max {most} limit a threshold, and none is given; leave them out"
            )
        if least is not None and most is not None and least > most:
            raise InputError(f"keep_min {least} is more than keep_max {most}; swap them")

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
        limits = ("min", self.keep_min), ("max", self.keep_max)
        parts += [f"{name}-{share}" for name, share in limits if share is not None]
        parts += ["pool-" + "-".join(map(str, self.pool))] if self.pool is not None else []
        parts += [f"dropped-{self.dropped}"] if self.dropped != "none" else []
        parts += ["sta-" + "-".join(map(str, self.window))] if self.window is not None else []
        return "_".join(parts) or "dense"

    @classmethod
    def parse(cls, algorithm: str) -> NablaConfig:
        """Read an algorithm string: `dense`, or parts joined by underscores, each at most once.

        `nabla-0.7` (threshold) or `keep-0.2`, `sta-11-3-3` (window in blocks), and what goes beside them: `min-0.05`,
        `max-0.3` (limits of a threshold), `pool-1-4-4` (parts in tokens), `dropped-mean`. Raises `InputError` for any
        other string.
        """
        numbers: dict[str, Any] = {}
        for part in [] if algorithm == "dense" else str(algorithm).split("_"):
            name, value = _read_part(part)
            # A threshold and a share are two forms of one choice.
            if name is None or name in numbers or {name, *numbers} >= {"threshold", "keep"}:
                raise InputError(
                    f"attention algorithm {algorithm!r} is not known; use dense, nabla-0.7, sta-11-3-3 "
                    "or nabla-0.6_sta-11-3-3 (threshold; window in blocks of frames, rows, columns)"
                )
            numbers[name] = value
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
        if algorithm is None or algorithm in KINDS:
            given = cls(**settings)
            if algorithm in (None, given.kind):
                return given
            raise InputError(
                f"attention algorithm {algorithm!r} takes {_NUMBERS[algorithm]}, but given are {_NUMBERS[given.kind]}"
            )
        named = cls.parse(algorithm)
        chosen = cls(**{name: settings[name] for name in ("threshold", "keep", "window") if name in settings})
        if not chosen.is_dense:
            raise InputError(
                f"attention algorithm {algorithm!r} carries its numbers already; remove {_NUMBERS[chosen.kind]}, "
                f"or name it by one of {', '.join(KINDS)}"
            )
        twice = [name for name in CHOICE if name in settings and getattr(named, name) != getattr(cls, name)]
        if twice:
            raise InputError(f"attention algorithm {algorithm!r} says its {twice[0]} already; remove the other")
        return replace(named, **settings)


_NUMBERS = {
    "dense": "no threshold and no window",
    "nabla": "a threshold (or keep)",
    "sta": "a window",
    "nabla_sta": "a threshold (or keep) and a window",
}


# Of the parts of an algorithm string: the field, how its value is written, and how it is read. Numbers may have
# exponents, since `algorithm` writes small ones so; nine digits of a size stay below `MAX_COUNT`.
_SHARE, _SIZES = r"(\d*\.?\d+(?:e-?\d+)?)", r"(\d{1,9}-\d{1,9}-\d{1,9})"
_PARTS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "nabla": ("threshold", _SHARE, float),
    "keep": ("keep", _SHARE, float),
    "min": ("keep_min", _SHARE, float),
    "max": ("keep_max", _SHARE, float),
    "sta": ("window", _SIZES, lambda text: tuple(map(int, text.split("-")))),
    "pool": ("pool", _SIZES, lambda text: tuple(map(int, text.split("-")))),
    "dropped": ("dropped", r"([a-z]+)", str),
}


def _read_part(part: str) -> tuple[str | None, Any]:
    """The field that a part of an algorithm string is for, and its value; no field for what is no such part."""
    head, _, rest = part.partition("-")
    name, written, read = _PARTS.get(head, (None, "", str))
    value = re.fullmatch(written, rest, re.ASCII)
    return (name, read(value[1])) if name is not None and value else (None, None)


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
