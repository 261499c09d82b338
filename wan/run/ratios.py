"""What MagCache's ratios hold for, and whether a run is that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wan.config.model_settings import expert_text
from wan.config.settings import Settings


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
    measured_on = (settings.cache and settings.cache.measured_on) or {}
    # A condition that the file does not name counts as the same.
    others = {name: value for name, value in conditions(settings).items() if measured_on.get(name, value) != value}
    if not others:
        return None
    then = ", ".join(f"{name} {measured_on[name]}" for name in others)
    now = ", ".join(f"{name} {value}" for name, value in others.items())
    again = "scripts/calibrate_cache.py measures others"
    return f"the cache's ratios were measured with {then}, and this runs with {now}; {again}"
