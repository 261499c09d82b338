"""What the study has found, a line of JSON each as it comes, so that a run that is cut goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nabla import InputError
from wan.files.atomic import written
from wan.files.json_files import complete_lines, to_line
from wan.tools.study.settings import Setting

RESULTS_FILE = "results.jsonl"
# Of values drawn again with replacement, for intervals.
RESAMPLES, CONFIDENCE = 4000, 0.95
DIGITS = 5


class Results:
    """Rows of a folder's `results.jsonl`: `part`, the fields of a setting, and by name a value for each sample."""

    def __init__(self, folder: Path):
        self.path = folder / RESULTS_FILE
        with written(self.path, "choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
        self.rows = read_rows(self.path) if self.path.is_file() else []

    def has(self, part: str, setting: Setting) -> bool:
        return find(self.rows, part, setting) is not None

    def add(self, part: str, setting: Setting, seconds: float, **values: Sequence[float]) -> None:
        """values: of samples, such as prompts and seeds, that come in the same order for all settings"""
        rounded = {name: [round(float(value), DIGITS) for value in some] for name, some in values.items()}
        self._write({"part": part, **setting.fields, "seconds": round(seconds, 2), "values": rounded})

    def note(self, **facts: Any) -> None:
        """A row of what the others were measured with."""
        if not any(row["part"] == "facts" and row["facts"] == facts for row in self.rows):
            self._write({"part": "facts", "facts": facts})

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        # Opened anew for each, so that what was measured is on the disk when the next is begun.
        with written(self.path, "free some space, and start again to go on"), self.path.open("a") as file:
            file.write(to_line(row))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; raises `InputError` if it cannot be read or holds something else."""
    try:
        rows = [json.loads(line) for line in complete_lines(path)]
        for row in rows:
            if row["part"] != "facts":
                Setting.of(row)
        return rows
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a {RESULTS_FILE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no {RESULTS_FILE} of the study ({error!r}); give one") from None


def find(rows: Iterable[dict[str, Any]], part: str, setting: Setting) -> dict[str, Any] | None:
    """The row of a part for a setting, or None."""
    return next((row for row in of_part(rows, part) if Setting.of(row) == setting), None)


def of_part(rows: Iterable[dict[str, Any]], part: str) -> Iterator[dict[str, Any]]:
    return (row for row in rows if row["part"] == part)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of samples, and the bootstrap's 95% interval of it."""
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(sample), (RESAMPLES, len(sample)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(sample[drawn].mean(1), (tail, 1 - tail))
    return float(sample.mean()), float(low), float(high)


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """`interval` of how much more values are than others of the same samples."""
    return interval([one - other for one, other in zip(values, others, strict=True)])
