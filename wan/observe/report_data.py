"""The numbers that a report shows, from the events of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nabla import InputError
from nabla.tiling import TileLayout
from nabla.window import window_mask
from wan.observe.events import Event
from wan.observe.step_trace import DENSE, MaskExample

PARTS = ("mask", "attention", "rest of the blocks", "outside blocks")


@dataclass(frozen=True)
class ReportData:
    """What a report shows, as numbers.

    densities: (layers, steps) mean shares of kept blocks, nan where a layer did not run; dense: bool, alike
    by_step: (steps,) densities of the layers that ran; complete: bool, where all did
    low, high: (steps,) the least and the greatest of any head of a sparse layer, nan without one
    stages: seconds by stage; parts: seconds of all steps by part of a step, those measured, or {}
    examples, window: blocks as they are drawn, bool (N, N); the window is None without one
    """

    densities: np.ndarray
    dense: np.ndarray
    by_step: np.ndarray
    complete: np.ndarray
    low: np.ndarray
    high: np.ndarray
    stages: dict[str, float]
    parts: dict[str, float]
    examples: tuple[MaskExample, ...]
    window: np.ndarray | None


def report_data(events: Sequence[Event], examples: Sequence[MaskExample] = ()) -> ReportData:
    """The numbers of a report."""
    steps = [event for event in events if event["kind"] == "step"]
    if not steps or events[0]["kind"] != "run":
        raise InputError("these records are of no sampling step; a report needs those of a whole video")
    run, shape = events[0], (events[0]["layers"], len(steps))
    densities, low, high = (np.full(shape, np.nan) for _ in range(3))
    dense, parts = np.zeros(shape, bool), dict.fromkeys(PARTS, 0.0)
    for layer in (event for event in events if event["kind"] == "layer"):
        at = layer["layer"], layer["step"]
        dense[at] = layer["kernel"] == DENSE
        if layer["kept"] is not None:
            densities[at] = layer["kept"]["mean"]
            if not dense[at]:
                low[at], high[at] = layer["kept"]["min"], layer["kept"]["max"]
        for part in ("mask", "attention", "block"):
            parts[part] = parts.get(part, 0.0) + (layer.get(f"{part}_ms") or 0.0) / 1000
    closing = [event for event in events if event["kind"] == "stages"]
    return ReportData(
        densities=densities,
        dense=dense,
        by_step=np.array([np.nan if step["kept"] is None else step["kept"] for step in steps]),
        complete=~np.isnan(densities).any(axis=0),
        low=_over_layers(np.fmin, low),
        high=_over_layers(np.fmax, high),
        stages=closing[-1]["seconds"] if closing else {},
        parts=_parts(parts, sum(step["ms"] for step in steps) / 1000),
        examples=tuple(examples),
        window=_window(run) if examples else None,
    )


def _over_layers(choose: np.ufunc, values: np.ndarray) -> np.ndarray:
    """(layers, steps) -> (steps,)."""
    # `fmin` and `fmax` pass over nan, and give it, without a warning, where there is nothing else.
    return choose.reduce(values, axis=0)


def _parts(seconds: dict[str, float], steps: float) -> dict[str, float]:
    """What blocks and steps take beside what was measured within them; nothing if blocks were not timed."""
    # Whole blocks are no part of their own: their rest is.
    blocks = seconds.pop("block", 0.0)
    if not blocks:
        return {}
    seconds["rest of the blocks"] = blocks - seconds["mask"] - seconds["attention"]
    # Steps also wait for what other processes do, but blocks never take longer than their steps, but for rounding.
    seconds["outside blocks"] = max(0.0, steps - blocks)
    return seconds


def _window(run: Event) -> np.ndarray | None:
    """The blocks of a run's window, bool (N, N) in the order of tiles, as examples have theirs; None without one."""
    if run["window"] is None:
        return None
    tiles = TileLayout.build(tuple(run["grid"]), tuple(run["tile"]), "cpu").tiles
    return window_mask(tiles, tuple(run["window"]), torch.device("cpu")).numpy()
