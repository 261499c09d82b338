"""A picture of a generation: what each layer kept in each step, example masks beside their window, and the time.

Drawn from the records that a log has, so that both say the same. Needs matplotlib, an optional requirement.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nabla import InputError
from nabla.tiling import TileLayout
from nabla.window import window_blocks
from wan.files.atomic import whole
from wan.files.video import check_writable
from wan.observe.profiler import DENSE, Example
from wan.observe.records import Record

ENDING = ".png"
PARTS = ("mask", "attention", "rest of the blocks", "outside blocks")
DPI = 110


@dataclass(frozen=True)
class Drawn:
    """What a report shows, as numbers.

    kept: (layers, steps) mean shares of kept blocks, nan where a layer did not run; dense: bool, alike
    by_step: (steps,) shares of the layers that ran; whole: bool, where all did
    low, high: (steps,) the least and the greatest of any head of a sparse layer, nan without one
    stages: seconds by stage; parts: seconds of all steps by part of a step, those measured, or {}
    examples, window: blocks as they are drawn, bool (N, N); the window is None without one
    """

    kept: np.ndarray
    dense: np.ndarray
    by_step: np.ndarray
    whole: np.ndarray
    low: np.ndarray
    high: np.ndarray
    stages: dict[str, float]
    parts: dict[str, float]
    examples: tuple[Example, ...]
    window: np.ndarray | None


def check_report(path: Path) -> None:
    """Raise `InputError` unless a report can be drawn, to `path`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"report {path} needs matplotlib, which is not installed; pip install matplotlib")
    if path.suffix != ENDING:
        raise InputError(f"report {path} must end in {ENDING}")
    check_writable(path, "--report")


def draw_report(records: Sequence[Record], path: str | Path, examples: Sequence[Example] = ()) -> Drawn:
    """Write a picture of one video's records, its prompt in the PNG's description too, and return what it shows.

    records: of a `wan.Recorder`, or of its log by `wan.observe.run_log.read_log`; examples: of the recorder
    Raises `InputError` without matplotlib, for records of no step, and if the file cannot be written.
    """
    path = Path(path)
    check_report(path)
    drawn = drawn_of(records, examples)
    # Imported here, since matplotlib is an optional requirement.
    from wan.observe.report_figure import figure_of

    figure = figure_of(records[0], drawn)
    with whole(path, "choose another --report") as partial:
        about = {"Description": records[0].get("prompt") or ""}
        figure.savefig(partial, dpi=DPI, format="png", metadata=about)
    return drawn


def drawn_of(records: Sequence[Record], examples: Sequence[Example] = ()) -> Drawn:
    """The numbers of a report."""
    steps = [record for record in records if record["kind"] == "step"]
    if not steps or records[0]["kind"] != "run":
        raise InputError("these records are of no sampling step; a report needs those of a whole video")
    run, shape = records[0], (records[0]["layers"], len(steps))
    kept, low, high = (np.full(shape, np.nan) for _ in range(3))
    dense, parts = np.zeros(shape, bool), dict.fromkeys(PARTS, 0.0)
    for layer in (record for record in records if record["kind"] == "layer"):
        at = layer["layer"], layer["step"]
        dense[at] = layer["kernel"] == DENSE
        if layer["kept"] is not None:
            kept[at] = layer["kept"]["mean"]
            if not dense[at]:
                low[at], high[at] = layer["kept"]["min"], layer["kept"]["max"]
        for part in ("mask", "attention", "block"):
            parts[part] = parts.get(part, 0.0) + (layer.get(f"{part}_ms") or 0.0) / 1000
    closing = [record for record in records if record["kind"] == "stages"]
    return Drawn(
        kept=kept,
        dense=dense,
        by_step=np.array([np.nan if step["kept"] is None else step["kept"] for step in steps]),
        whole=~np.isnan(kept).any(axis=0),
        low=_over_layers(np.fmin, low),
        high=_over_layers(np.fmax, high),
        stages=closing[-1]["seconds"] if closing else {},
        parts=_parts(parts, sum(step["ms"] for step in steps) / 1000),
        examples=tuple(examples),
        window=_window(run) if examples else None,
    )


def _over_layers(choose: np.ufunc, shares: np.ndarray) -> np.ndarray:
    return choose.reduce(shares, axis=0)


def _parts(seconds: dict[str, float], steps: float) -> dict[str, float]:
    """What blocks and steps take beside what was measured within them; nothing if blocks were not timed."""
    blocks = seconds.pop("block", 0.0)
    if not blocks:
        return {}
    seconds["rest of the blocks"] = blocks - seconds["mask"] - seconds["attention"]
    # Steps also wait for what other processes do, but blocks never take longer than their steps, but for rounding.
    seconds["outside blocks"] = max(0.0, steps - blocks)
    return seconds


def _window(run: Record) -> np.ndarray | None:
    if run["window"] is None:
        return None
    tiles = TileLayout.build(tuple(run["grid"]), tuple(run["tile"]), "cpu").tiles
    return window_blocks(tiles, tuple(run["window"]), torch.device("cpu")).numpy()
