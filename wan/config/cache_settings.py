"""How a run reuses what blocks computed in earlier steps: the `cache` of the settings, and `--cache`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from nabla import InputError
from nabla.checks import is_count, is_number
from wan.config.checks import MAX_STEPS, check_keys, recordable
from wan.config.config_files import CONFIG_FOLDER
from wan.config.measured_files import read_measured
from wan.files.plain_data import read_json

# Thresholds that diffusers sets by default; not measured here.
THRESHOLDS = {"first_block": 0.05, "mag": 0.06}
# Of the hidden states, that both guidance branches keep; TaylorSeer's are of the last layer, which is far narrower.
COPIES = {"first_block": 6, "mag": 4, "taylorseer": 1}
KINDS = tuple(COPIES)
INTERVAL = 2
MAX_SKIPS = 3
# Of ratios that were published with a checkpoint.
RATIOS_FOLDER = CONFIG_FOLDER / "magcache"


@dataclass(frozen=True)
class CacheSettings:
    """One of diffusers' step caches.

    kind: `first_block` computes the first block of every forward, and reuses what the others added when it was last
        computed while the first one's own addition changed by less than the threshold, relatively; `mag` is MagCache
        (arXiv 2506.09045), which knows from ratios measured beforehand how much additions change from step to step, and
        reuses them while the error that these predict is below the threshold; `taylorseer` (arXiv 2503.06923) computes
        every few steps, and between them has the last layer's output go on along the line through the last two
    threshold: 0 never reuses; None takes that of `THRESHOLDS`; not of `taylorseer`
    warmup: the share of a video's steps, from its first, that are computed in any case; dense steps always are
    max_skips: after so many forwards of a guidance branch that reuse, one is computed; None takes what the file of
        ratios says, or `MAX_SKIPS`; not of `taylorseer`
    interval: of `taylorseer`, from one computed step to the next
    ratios: of `mag`, a number a step, or the file that scripts/calibrate_cache.py writes, or the name of one in
        configs/magcache; for another number of steps the nearest are taken
    measured_on: what `ratios` hold for, as their file says too: checkpoint, attention, steps and more, if known
    """

    kind: str
    threshold: float | None = None
    warmup: float = 0.2
    max_skips: int | None = None
    interval: int | None = None
    ratios: tuple[float, ...] | None = None
    # Left out of the hash, which a mapping does not have.
    measured_on: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"cache {self.kind!r} is not known; use one of none, {', '.join(KINDS)}")
        if self.kind == "taylorseer":
            self._check_limit("interval", INTERVAL, "threshold")
            if self.interval is None or not is_count(self.interval) or not 2 <= self.interval <= MAX_STEPS:
                raise InputError(
                    f"cache interval {self.interval!r} is not a whole number of steps from 2 to {MAX_STEPS}"
                )
        else:
            self._check_limit("threshold", THRESHOLDS[self.kind], "interval")
            if self.threshold is None or not is_number(self.threshold) or self.threshold < 0:
                raise InputError(f"cache threshold {self.threshold!r} is not a number of at least 0 (0 never reuses)")
        if not is_number(self.warmup) or not 0 <= self.warmup <= 1:
            raise InputError(f"cache warmup {self.warmup!r} is not a share of the steps from 0 to 1; 0.2 is usual")
        # A file's name stands where its numbers will: sidecars have these, and need no file to be made again.
        said: dict[str, Any] = _read(self.ratios) if isinstance(self.ratios, str) else {}
        object.__setattr__(self, "ratios", _checked(said.get("ratios", self.ratios)))
        object.__setattr__(
            self, "measured_on", recordable("cache measured_on", said.get("measured_on", self.measured_on))
        )
        if self.max_skips is None:
            object.__setattr__(self, "max_skips", said.get("max_skips", MAX_SKIPS))
        if self.max_skips is None or not is_count(self.max_skips) or self.max_skips > MAX_STEPS:
            raise InputError(
                f"cache max_skips {self.max_skips!r} is not a whole number of steps up to {MAX_STEPS}; 3 is usual"
            )
        if (self.kind == "mag") != (self.ratios is not None):
            raise InputError(
                "cache mag needs the ratios of the checkpoint; measure them with scripts/calibrate_cache.py"
                if self.kind == "mag"
                else f"cache {self.kind} has no use for ratios; leave them out"
            )

    def _check_limit(self, own: str, usual: float, other: str) -> None:
        """Give a kind's own limit its usual value if it has none, and refuse that of other kinds."""
        if getattr(self, other) is not None:
            raise InputError(f"cache {self.kind} has no use for {other} {getattr(self, other)!r}; leave it out")
        if getattr(self, own) is None:
            object.__setattr__(self, own, usual)

    @classmethod
    def parse(cls, given: object, ratios: Sequence[float] | None = None) -> CacheSettings | None:
        """From `none`, `kind`, `kind:threshold`, `mag:threshold:ratios.json`, `taylorseer:interval`, or a mapping.

        None where it is off.

        ratios: for a string that names no file of them
        """
        if isinstance(given, cls):
            return given
        if given is None or given is False or given == "none":
            return None
        if isinstance(given, Mapping):
            allowed = [item.name for item in fields(cls)]
            check_keys("cache", given, allowed)
            # A mapping without a kind gets the line about unknown ones, not a TypeError.
            return cls(**{"kind": None, **given})
        if not isinstance(given, str):
            raise InputError(f"cache {given!r} is neither none, nor kind:threshold, nor a mapping of settings")
        kind, _, rest = given.partition(":")
        # The file comes last, so its name may hold colons.
        limit, _, file = rest.partition(":")
        try:
            number = float(limit) if limit else None
        except ValueError:
            raise InputError(f"cache {given!r}: {limit!r} is not a number; write kind:threshold[:file]") from None
        # A file is read, and an interval that is no whole number refused, when the settings are made.
        content: Any = file or ratios
        if kind == "taylorseer":
            interval: Any = int(number) if number is not None and number.is_integer() else number
            return cls(kind, interval=interval, ratios=content)
        return cls(kind, number, ratios=content)

    @property
    def short(self) -> str:
        """As `parse` takes it, without ratios."""
        return f"{self.kind}:{self.threshold if self.interval is None else self.interval:g}"

    def describe(self) -> str:
        limit = f"threshold {self.threshold}" if self.interval is None else f"interval {self.interval}"
        return f"{self.kind}, {limit}"


def _read(name: str) -> dict[str, Any]:
    """What a file of ratios says: these, what they were measured on, and how many forwards in a row may reuse."""
    content = read_measured("cache ratios", name, RATIOS_FOLDER, read_json, "ratios", "scripts/calibrate_cache.py")
    return {"measured_on": None, **content}


def _checked(given: Any) -> tuple[float, ...] | None:
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) or not given or not all(is_number(n) and n > 0 for n in given):
        raise InputError(f"cache ratios {given!r} are not positive numbers, one a step")
    return tuple(float(n) for n in given)
