"""The models that benchmarks measure, by name."""

from __future__ import annotations

from nabla import InputError
from wan.tools.benchmark.family import BenchmarkFamily
from wan.tools.benchmark.kandinsky_models import KANDINSKY
from wan.tools.benchmark.wan_models import WAN_FAMILIES

MODELS = {model: family for family in (*WAN_FAMILIES, KANDINSKY) for model in family.models}


def family_of(model: str, mode: str) -> BenchmarkFamily:
    """The family of a model, a key of `MODELS`; raises `InputError` if a mode does not measure it."""
    family = MODELS[model]
    if mode not in family.modes:
        able = ", ".join(name for name, other in MODELS.items() if mode in other.modes)
        raise InputError(f"mode {mode} does not measure {model}; use --model with one of {able}")
    return family
