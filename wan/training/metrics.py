"""The metrics of a run: a JSON object a step, and a drawing of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla import InputError
from nabla.checks import is_count
from wan.files.atomic import atomic_path, written
from wan.files.json_files import complete_lines, to_line
from wan.files.plain_data import parse_json

REMEDY = "free some space, and start again to go on"

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """The rows of a run's `metrics.jsonl`, in order of their `step`; those after `last_step` are dropped.

    last_step: that of the state that a run goes on from; 0 for one that begins, of which no earlier rows are kept
    """

    def __init__(self, run: Path, last_step: int):
        self.path = run / METRICS_FILE
        # Rows after the state's step come anew, when those steps are taken again.
        earlier = read_metrics(self.path) if last_step and self.path.is_file() else []
        kept = [row for row in earlier if row["step"] <= last_step]
        with atomic_path(self.path) as partial:
            partial.write_text("".join(map(to_line, kept)), encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Raises `InputError` if it cannot be written."""
        with written(self.path, REMEDY), self.path.open("a", encoding="utf-8") as file:
            file.write(to_line(row))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of metrics, without a last one that was cut while it was written.

    Raises `InputError` if it cannot be read or holds something else.
    """
    try:
        rows = [_row(line) for line in complete_lines(path)]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a file that can be") from None
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}); remove the line, or the file: the run goes on without"
        ) from None
    return rows


def _row(line: str) -> dict[str, Any]:
    row = parse_json(line)
    if not isinstance(row, dict) or not is_count(row.get("step")):
        raise ValueError(f"a line is no row of a step: {line[:60]!r}")
    return row


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
    # Without pyplot, which may look for a display.
    figure = Figure(figsize=(12, 3 * -(-len(shown) // 2)), layout="constrained")
    for place, (title, keys) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(-(-len(shown) // 2), 2, place)
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points), label=key.rpartition("_")[2], linewidth=1)
        axes.set(title=title, xlabel="step")
        if len(keys) > 1:
            axes.legend()
    # Made by `atomic_path`, a folder of a name that is mistyped would be no error.
    path.parent.stat()
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:] or "png")


def speed(clips: int, tokens: int, seconds: float) -> dict[str, float]:
    """What a row says of the speed of a step of so many clips, of so many tokens each."""
    return {"seconds": seconds, "clips_per_s": clips / seconds, "tokens_per_s": clips * tokens / seconds}
