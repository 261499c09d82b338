"""What the study compares: a rule, a share, and what goes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nabla import InputError, NablaConfig
from wan.config.attention_settings import attention_config
from wan.tools.study.rules import RULES

DENSE = "dense"
PROFILE = "profile"
# Of the sampling steps, at the beginning.
QUARTER = 0.25


@dataclass(frozen=True)
class Setting:
    """One attention of the study. By its fields it is found again in the results.

    rule: a key of `RULES`, `DENSE`, or `PROFILE`
    share: of key blocks that every row keeps
    layer_0: whether the first layer runs dense
    dense_steps: the share of the steps, at the beginning, that run dense
    dropped: what stands for blocks that are left out, as in `NablaConfig`
    profile: the YAML file of `PROFILE`, whose mean share is `share`
    weights: the share that the weights were distilled at, with 2x2 parts and a dense layer 0, or None for the shipped
    """

    rule: str
    share: float = 1.0
    layer_0: bool = False
    dense_steps: float = 0.0
    dropped: str = "none"
    profile: str = ""
    weights: float | None = None

    @classmethod
    def of(cls, record: dict[str, Any]) -> Setting:
        """That of a record of results."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})

    @property
    def fields(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def words(self) -> str:
        """For people, such as `2x2 parts 10%, layer 0 dense, 25% of steps dense`."""
        if self.rule == DENSE:
            parts = ["dense"]
        elif self.rule == PROFILE:
            parts = [f"{Path(self.profile).stem} {self.share:.0%}"]
        else:
            parts = [f"{RULES[self.rule].words} {self.share:.0%}"]
        parts += ["layer 0 dense"] * self.layer_0
        parts += [f"{self.dense_steps:.0%} of steps dense"] * (self.dense_steps > 0)
        parts += [f"dropped {self.dropped}"] * (self.dropped != "none")
        if self.weights is not None:
            parts.append(f"distilled at {self.weights:.0%}")
        return ", ".join(parts)

    def config(self, layers: int) -> NablaConfig:
        """The attention, of a transformer of so many layers. Its rule may have to be put in besides."""
        if self.rule == DENSE:
            return NablaConfig()
        if self.rule == PROFILE:
            return read_profile(Path(self.profile))
        if self.rule not in RULES:
            raise InputError(f"rule {self.rule!r} is not known; use one of {', '.join(RULES)}")
        config = RULES[self.rule].config(self.share)
        dense_layers = (0,) if self.layer_0 and layers else ()
        return replace(config, dense_layers=dense_layers, dense_steps=self.dense_steps or 0, dropped=self.dropped)


def of_profiles(paths: Sequence[Path]) -> list[Setting]:
    """Those of calibrated profiles; raises `InputError` for a file that is none."""
    profiles = [(path, read_profile(path).profile) for path in paths]
    return [Setting(PROFILE, round(found.mean_keep, 4), profile=str(path)) for path, found in profiles if found]


def read_profile(path: Path) -> NablaConfig:
    """The attention of a file that scripts/calibrate_attention.py wrote."""
    return attention_config({"profile": str(path)})


def of_errors(shares: Sequence[float]) -> Iterator[Setting]:
    """Those whose output is compared with dense attention's, the most telling first, in case time is short."""
    own = ("means", "parts")
    for layer_0 in (True, False):
        yield from (Setting(rule, share, layer_0) for rule in (*own, "best") for share in shares)
    yield from (Setting("parts", share, True, dropped="mean") for share in shares)
    others = [rule for rule in RULES if rule not in (*own, "best")]
    for layer_0 in (True, False):
        yield from (Setting(rule, share, layer_0) for rule in others for share in shares)
    for rule, layer_0 in (("parts", False), ("means", True), ("means", False)):
        yield from (Setting(rule, share, layer_0, dropped="mean") for share in shares)


def of_videos(shares: Sequence[float]) -> Iterator[Setting]:
    """Those of which whole videos are compared with the dense ones, of the same noise."""
    middle = middle_of(shares)
    # Those that say most first: all shares with what every setting should have.
    yield from (Setting(rule, share, True, QUARTER) for share in shares for rule in ("means", "parts"))
    yield from (Setting("best", share, True, QUARTER) for share in middle)
    yield from (Setting("parts", share, True, QUARTER, "mean") for share in middle)
    others = [rule for rule in RULES if rule not in ("means", "parts", "best")]
    for share in middle:
        # What each part of the setting is worth.
        for layer_0, steps in ((False, QUARTER), (True, 0.0), (False, 0.0)):
            yield from (Setting(rule, share, layer_0, steps) for rule in ("means", "parts"))
        yield from (Setting(rule, share, True, QUARTER) for rule in others)
    yield from (Setting("best", share, True) for share in middle)


def of_sentences(shares: Sequence[float]) -> Iterator[Setting]:
    """Those of which it is measured how often videos show what their sentences say."""
    middle = middle_of(shares)[::-1]
    yield Setting(DENSE)
    for steps in (0.0, QUARTER):
        yield from (Setting("parts", share, True, steps) for share in middle)
    yield from (Setting("means", share) for share in middle)
    for share in middle:
        yield Setting("means", share, True, QUARTER)
        yield Setting("best", share, True)
        yield Setting("parts", share, True, QUARTER, "mean")


def middle_of(shares: Sequence[float]) -> Sequence[float]:
    """A tenth and a fifth, of which most is asked, or the first share where they are not among these."""
    return [share for share in shares if share in (0.1, 0.2)] or shares[:1]


def of_distilled(share: float) -> dict[str, list[Setting]]:
    """What is measured of weights that were distilled at a share, by part of the study."""
    sparse = Setting("parts", share, True, weights=share)
    return {
        "error": [sparse],
        "videos": [sparse, replace(sparse, dense_steps=QUARTER)],
        "sentences": [sparse],
    }
