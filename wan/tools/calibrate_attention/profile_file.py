"""The file of a profile: what each layer keeps in each stretch of steps, and what it was measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nabla import NablaConfig
from wan.files.atomic import atomic_path
from wan.tools.calibrate_attention.stretches import Span

# Ends are rounded down to so many places, for a stretch ends with the step that its share is rounded up to.
PLACES = 6
ABOUT = "# Shares of blocks by stretch of steps, one a layer; 1 is dense. `attention: {profile: this file}` runs it.\n"


def profile_of(
    spans: Sequence[Span], keep: Sequence[Sequence[float]], steps: int, config: NablaConfig, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Plain values of the file; steps before the first of the spans are dense. about: its `measured_on`"""
    layers = len(keep[0])
    dense = [(spans[0].begin, [1.0] * layers)] if spans[0].begin else []
    ends = dense + [(span.end, list(shares)) for span, shares in zip(spans, keep)]
    stretches = [{"until": _share(end, steps), "keep": shares} for end, shares in ends]
    sizes = {"pool": config.pool, "window": config.window, "tile": config.tile}
    return {
        "stretches": stretches,
        **{name: list(value) for name, value in sizes.items() if value is not None},
        **({} if config.dropped == "none" else {"dropped": config.dropped}),
        "measured_on": dict(about),
    }


def write_profile(path: Path, profile: Mapping[str, Any]) -> None:
    """Write YAML, whole or not at all."""
    # Lists of numbers in one line each, mappings open.
    text = yaml.safe_dump(dict(profile), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    with atomic_path(path, "choose another --out") as partial:
        partial.write_text(ABOUT + text, encoding="utf-8")


def _share(end: int, steps: int) -> float:
    return 1.0 if end == steps else math.floor(end / steps * 10**PLACES) / 10**PLACES
