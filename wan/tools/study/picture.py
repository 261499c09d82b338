"""The picture of the study: error and likeness by rule, over the share of blocks and over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.files.atomic import atomic_path
from wan.tools.study.rules import RULES
from wan.tools.study.settings import QUARTER, Setting
from wan.tools.study.times import Times

Row = dict[str, Any]
# Of rules that this project has, of the best possible one, and of others.
COLOURS = {"means": "#c05621", "parts": "#2b6cb0", "best": "#2f855a"}
OTHERS = ("#718096", "#b794f4", "#d69e2e", "#63b3ed", "#f687b3")
# Inches of a panel, and dots an inch.
WIDTH, HEIGHT, DPI = 5, 4.6, 110


def draw(rows: Sequence[Row], times: Times, path: Path) -> None:
    """rows: those of a `summary`. Raises `InputError` if matplotlib is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is not there, which draws pictures; pip install matplotlib") from None
    panels = 2 if times.dense is None else 3
    figure = Figure(figsize=(WIDTH * panels, HEIGHT), layout="constrained")
    left, middle, *rest = figure.subplots(1, panels)
    errors, videos = ([row for row in rows if row["part"] == part] for part in ("error", "videos"))
    _lines(left, errors, "error", 0.0, lambda setting: 100 * setting.share)
    left.set(xlabel="blocks kept, %", ylabel="error of the output to dense", title="Layer 0 dense (dashed: sparse)")
    _lines(middle, videos, "psnr", QUARTER, lambda setting: 100 * setting.share)
    middle.set(xlabel="blocks kept, %", ylabel="PSNR to the dense video, dB", title="A quarter of the steps dense too")
    for right in rest:
        _lines(right, errors, "error", 0.0, times.of)
        right.set(xlabel="ms of attention a layer of the 14B", ylabel="error of the output to dense")
        right.set_title("At equal time")
    for axes in (left, middle, *rest):
        axes.grid(alpha=0.3)
    for axes in (left, *rest):
        axes.set_ylim(bottom=0)
    left.legend(fontsize=8)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=DPI, format="png")


def _lines(axes: Any, rows: list[Row], measure: str, steps: float, place: Callable[[Setting], float | None]) -> None:
    """A line a rule, with a band for the interval, over where settings are placed."""
    for label, style, some in _series(rows, steps):
        points = sorted((where, *row[measure]) for row in some if (where := place(Setting.of(row))) is not None)
        if not points:
            continue
        x, mean, low, high = zip(*points)
        axes.plot(x, mean, marker="o", markersize=3, label=label, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _series(rows: list[Row], steps: float) -> Iterator[tuple[str, dict[str, Any], list[Row]]]:
    """Rows of each rule with a dense layer 0 and, of nabla's own, without it and with means of dropped blocks."""
    others = iter(OTHERS)
    for rule in RULES:
        colour = COLOURS.get(rule) or next(others)
        kinds = {(True, "none"): ("-", "")}
        if rule in ("means", "parts"):
            kinds |= {(False, "none"): ("--", ", layer 0 sparse")}
        if rule == "parts":
            kinds |= {(True, "mean"): (":", ", dropped mean")}
        for (layer_0, dropped), (line, words) in kinds.items():
            some = [row for row in rows if _is_of(Setting.of(row), rule, layer_0, dropped, steps)]
            yield RULES[rule].words + words, {"color": colour, "linestyle": line}, some


def _is_of(setting: Setting, rule: str, layer_0: bool, dropped: str, steps: float) -> bool:
    wanted = Setting(rule, setting.share, layer_0, steps, dropped)
    return setting == wanted
