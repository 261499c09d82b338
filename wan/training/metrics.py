"""The metrics of a run: a JSON object a step, and a drawing of them."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wan.files import whole
from wan.memory import GIB

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """The rows of a run's `metrics.jsonl`, in order of their `step`; those after `last_step` are dropped.

    last_step: that of the state that a run goes on from; 0 for one that begins, of which no earlier rows are kept
    """

    def __init__(self, run: Path, last_step: int):
        self.path = run / METRICS_FILE
        earlier = read_metrics(self.path) if last_step and self.path.is_file() else []
        kept = [row for row in earlier if row["step"] <= last_step]
        with whole(self.path) as partial:
            partial.write_text("".join(map(_line, kept)), encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of metrics, without a last one that was cut while it was written."""
    lines = path.read_text(encoding="utf-8").split("\n")
    # A whole line ends in a line break.
    return [json.loads(line) for line in lines[:-1]]


def draw_metrics(rows: list[dict[str, Any]], path: Path) -> None:
    """A picture of what changes over the steps, a panel each; needs matplotlib."""
    from matplotlib.figure import Figure

    panels = {
        "loss": ("loss",),
        "validation loss": ("validation_dense", "validation_sparse"),
        "learning rate": ("lr",),
        "gradient norm": ("grad_norm",),
        "tokens a second": ("tokens_per_s",),
        "share of blocks kept": ("kept",),
        "peak memory, GiB": ("memory_gib",),
    }
    shown = {title: keys for title, keys in panels.items() if any(key in row for row in rows for key in keys)}
    figure = Figure(figsize=(12, 3 * -(-len(shown) // 2)), layout="constrained")
    for place, (title, keys) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(-(-len(shown) // 2), 2, place)
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points), label=key.rpartition("_")[2], linewidth=1)
        axes.set(title=title, xlabel="step")
        if len(keys) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)


def speed(clips: int, tokens: int, seconds: float) -> dict[str, float]:
    """What a row says of the speed of a step of so many clips, of so many tokens each."""
    return {"seconds": seconds, "clips_per_s": clips / seconds, "tokens_per_s": clips * tokens / seconds}


def peak_memory(device: torch.device) -> float:
    """GiB that this process has used at most, of the GPU's memory if it runs on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
