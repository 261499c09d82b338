"""What to attend to: the settings of one sparse attention, and how they are written in YAML and on a command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from nabla import config_text
from nabla.checks import MAX_COUNT, InputError, is_count, is_number
from nabla.profile import KeepProfile
from nabla.shares import checked_layers, checked_steps, layer_numbers, step_count

BACKEND_NAMES = ("auto", "cudnn", "flex", "gather", "reference")
KINDS = ("dense", "nabla", "sta", "nabla_sta")
DROPPED = ("none", "mean")
# What an algorithm string says, so that no other setting says it again.
CHOICE = ("threshold", "keep", "keep_min", "keep_max", "window", "pool", "dropped")
MAX_BLOCK = 1024


@dataclass(frozen=True)
class NablaConfig:
    """One sparse attention. With neither `threshold`, `keep`, `profile` nor `window` it is dense attention.

    threshold: share of each query block's probability that the kept key blocks must reach, in (0, 1]
    keep: instead of a threshold, the density of every row, the share of key blocks that it keeps, in (0, 1]
    window: (frames, rows, columns) in blocks; every block within half of it on each axis is kept too
    tile: (frames, rows, columns) of tokens that make one block
    pool: (frames, rows, columns) of tokens that are averaged into one before blocks are chosen; divides the tile, which
        it is by default (None)
    keep_min, keep_max: least and greatest share of key blocks that a row keeps by a threshold, in (0, 1]
    dropped: what stands for the blocks that are not kept: "none", or their "mean" keys and values
    dense_steps: how many sampling steps run dense before the sparse ones; below 1 a share of a run's steps, rounded up
    dense_layers: transformer layers that always run dense, counted from 0; or a share of them, the first ones
    mask_refresh: sampling steps for which a layer keeps the blocks that it chose, for both guidance branches
    backend: the kernel, one of `BACKEND_NAMES`
    profile: instead of threshold, keep, dense_steps and dense_layers, what each layer keeps in each stretch of steps
    """

    threshold: float | None = None
    window: tuple[int, int, int] | None = None
    tile: tuple[int, int, int] = (1, 8, 8)
    keep: float | None = None
    pool: tuple[int, int, int] | None = None
    keep_min: float | None = None
    keep_max: float | None = None
    dropped: str = "none"
    dense_steps: int | float = 0
    dense_layers: tuple[int, ...] | float = ()
    mask_refresh: int = 1
    backend: str = "auto"
    profile: KeepProfile | None = None

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
        object.__setattr__(self, "dense_steps", checked_steps(self.dense_steps))
        object.__setattr__(self, "dense_layers", checked_layers(self.dense_layers))
        self._check_profile()
        if not is_count(self.mask_refresh) or not 1 <= self.mask_refresh <= MAX_COUNT:
            raise InputError(f"mask_refresh {self.mask_refresh!r}: give a whole number of sampling steps, 1 or more")
        if self.mask_refresh > 1 and not self.selects:
            raise InputError(f"mask_refresh {self.mask_refresh} has no use for {self.kind}, whose blocks do not change")
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
        for name, limit in (("keep_min", least), ("keep_max", most)):
            if limit is not None and self.threshold is None:
                raise InputError(f"{name} {limit} limits a threshold, and none is given; leave it out")
        if least is not None and most is not None and least > most:
            raise InputError(f"keep_min {least} is more than keep_max {most}; swap them")

    def _check_profile(self) -> None:
        if self.profile is None:
            return
        if not isinstance(self.profile, KeepProfile):
            raise InputError(f"profile {self.profile!r} is none; read it with nabla.KeepProfile.from_dict")
        for name in ("threshold", "keep", "dense_steps", "dense_layers"):
            if value := getattr(self, name):
                raise InputError(
                    f"{name} {value!r} does not go with a profile, which says what layers keep; leave it out"
                )

    @property
    def block(self) -> int:
        """Tokens in a full block."""
        return math.prod(self.tile)

    @property
    def selects(self) -> bool:
        """Whether blocks are chosen from the content of q and k."""
        return self.threshold is not None or self.keep is not None or self.profile is not None

    @property
    def is_dense(self) -> bool:
        return not self.selects and self.window is None

    @property
    def kind(self) -> str:
        """One of `KINDS`: what the blocks are kept by."""
        return "_".join(["nabla"] * self.selects + ["sta"] * (self.window is not None)) or "dense"

    @property
    def algorithm(self) -> str:
        """The string that `parse` reads, such as `nabla-0.6_sta-11-3-3`; with a profile it has its name, for people."""
        said = {name: value for name in CHOICE if (value := getattr(self, name)) not in (None, "none")}
        parts = ([self.profile.name] if self.profile else []) + config_text.written(said)
        return "_".join(parts) or "dense"

    def dense_step_count(self, steps: int | None) -> int:
        """How many first steps run dense in all layers, of so many; raises `InputError` where that takes to know them.

        steps: of the run; None where nothing says it
        """
        return self.profile.dense_step_count(steps) if self.profile else step_count(self.dense_steps, steps)

    def dense_layer_numbers(self, layers: int) -> tuple[int, ...]:
        """Which of so many layers run dense in all steps; raises `InputError` for one that does not exist."""
        if self.profile is None:
            return layer_numbers(self.dense_layers, layers)
        self.profile.check_layers(layers)
        return tuple(n for n in range(layers) if all(one.keep[n] == 1 for one in self.profile.stretches))

    def at(self, layer: int, layers: int, step: int, steps: int | None) -> NablaConfig:
        """What a layer of so many runs in a step of so many, both counted from 0: a config alike for all steps.

        steps: None where nothing says how many, which shares of steps raise `InputError` for
        """
        if self.is_dense or layer in self.dense_layer_numbers(layers) or step < self.dense_step_count(steps):
            return NablaConfig()
        if self.profile is None:
            return replace(self, dense_steps=0, dense_layers=())
        keep = self.profile.stretch_at(step, steps).keep[layer]
        return NablaConfig() if keep == 1 else replace(self, profile=None, keep=keep)

    @classmethod
    def parse(cls, algorithm: str) -> NablaConfig:
        """Read an algorithm string: `dense`, or parts joined by underscores, each at most once.

        `nabla-0.7` (threshold) or `keep-0.2`, `sta-11-3-3` (window in blocks), and what goes beside them: `min-0.05`,
        `max-0.3` (limits of a threshold), `pool-1-4-4` (parts in tokens), `dropped-mean`. Raises `InputError` for any
        other string.
        """
        return cls(**config_text.read(algorithm))

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
        if isinstance(settings.get("profile"), Mapping):
            settings["profile"] = KeepProfile.from_dict(settings["profile"])
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


def _three_positive(name: str, value: object) -> tuple[int, int, int]:
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 3
        or not all(is_count(n) and 0 < n <= MAX_COUNT for n in value)
    ):
        raise InputError(f"{name} {value!r} is not three positive integers (frames, rows, columns)")
    frames, rows, columns = map(int, value)
    return frames, rows, columns
