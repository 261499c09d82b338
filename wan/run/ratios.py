"""What MagCache's ratios and profiles of attention hold for, and whether a run is that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla import KeepProfile
from wan.config.model_settings import expert_text
from wan.config.settings import Settings

# Of `conditions`, those that the shares of a profile depend on most.
_PROFILES_HOLD_FOR = ("checkpoint", "transformer", "lora", "shift", "guide_scale")


def conditions(settings: Settings) -> dict[str, Any]:
    """What MagCache's ratios depend on, as plain values; files by their names alone, which may lie elsewhere later."""
    sampling = settings.sampling
    return {
        "checkpoint": Path(settings.checkpoint).name,
        "transformer": ",".join(_named(*item) for item in settings.model.transformer_files.items()) or None,
        "lora": [f"{_named(one.expert, one.file)}:{one.scale:g}" for one in settings.lora],
        "fp8": settings.fp8,
        "attention": settings.attention.algorithm,
        "solver": sampling.solver,
        "steps": sampling.steps,
        "shift": sampling.shift,
        "guide_scale": sampling.plain_guide_scale,
    }


def _named(expert: str | None, file: str) -> str:
    return expert_text(expert) + Path(file).name


def measured_otherwise(settings: Settings) -> str | None:
    """A line if the ratios of a run's cache were measured under other conditions, as far as they say."""
    on = (settings.cache and settings.cache.measured_on) or {}
    return _otherwise("the cache's ratios were", on, conditions(settings), "scripts/calibrate_cache.py measures others")


def profile_measured_otherwise(settings: Settings) -> str | None:
    """A line if the profile of a run's attention was measured under other conditions, as far as it says."""
    profile: KeepProfile | None = settings.attention.profile
    on = (profile and profile.measured_on) or {}
    # Its shares of steps are for any number of them, and one of a few is measured by walks of a few.
    now = {name: value for name, value in conditions(settings).items() if name in _PROFILES_HOLD_FOR}
    return _otherwise("the profile was", on, now, "scripts/calibrate_attention.py measures another")


def _otherwise(what: str, measured_on: Mapping[str, Any], now: Mapping[str, Any], again: str) -> str | None:
    # A condition that the file does not name counts as the same.
    others = {name: value for name, value in now.items() if measured_on.get(name, value) != value}
    if not others:
        return None
    then = ", ".join(f"{name} {measured_on[name]}" for name in others)
    here = ", ".join(f"{name} {value}" for name, value in others.items())
    return f"{what} measured with {then}, and this runs with {here}; {again}"
