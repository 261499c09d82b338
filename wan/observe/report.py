"""A picture of a generation: what each layer kept in each step, example masks beside their window, and the time.

Drawn from the events that a log has, so that both say the same. Needs matplotlib, an optional requirement.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from nabla import InputError
from wan.files.atomic import atomic_path
from wan.files.video import check_writable
from wan.observe.events import Event
from wan.observe.report_data import ReportData, report_data
from wan.observe.step_trace import MaskExample

ENDING = ".png"
DPI = 110


def check_report(path: Path) -> None:
    """Raise `InputError` unless a report can be drawn, to `path`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"report {path} needs matplotlib, which is not installed; pip install matplotlib")
    if path.suffix != ENDING:
        raise InputError(f"report {path} must end in {ENDING}")
    check_writable(path, "--report")


def draw_report(events: Sequence[Event], path: str | Path, examples: Sequence[MaskExample] = ()) -> ReportData:
    """Write a picture of one video's events, its prompt in the PNG's description too, and return what it shows.

    events: `records` of a `wan.Recorder`, or of its log by `wan.observe.run_log.read_log`; examples: of the recorder
    Raises `InputError` without matplotlib, for events of no step, and if the file cannot be written.
    """
    path = Path(path)
    check_report(path)
    data = report_data(events, examples)
    # Imported here, since matplotlib is an optional requirement.
    from wan.observe.report_figure import figure_of

    figure = figure_of(events[0], data)
    # The partial file's name has no ending that would say the format.
    with atomic_path(path, "choose another --report") as partial:
        about = {"Description": events[0].get("prompt") or ""}
        figure.savefig(partial, dpi=DPI, format="png", metadata=about)
    return data
