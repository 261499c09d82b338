"""What the study has found, a line of JSON each as it comes, so that a run that is cut goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.files.atomic import atomic_path, written
from wan.files.json_files import complete_lines, to_line
from wan.tools.evaluate.bootstrap import estimate
from wan.tools.study.settings import Setting

RESULTS_FILE = "results.jsonl"
# Of values drawn again with replacement, for intervals.
RESAMPLES = 4000
DIGITS = 5
# Of what was measured with: those without which numbers differ by more than a card or a version makes.
DECIDING = ("ckpt_dir", "size", "frame_num", "steps", "prompts", "videos", "seeds", "sentences", "seed")


class Results:
    """Rows of a folder's `results.jsonl`: `part`, the fields of a setting, and by name a value for each sample."""

    def __init__(self, folder: Path):
        self.path = folder / RESULTS_FILE
        with written(self.path, "choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
        self.rows = read_rows(self.path) if self.path.is_file() else []
        if self.rows:
            # Without a line that was cut, to which the next one would be joined.
            with atomic_path(self.path) as partial:
                partial.write_text("".join(map(to_line, self.rows)), encoding="utf-8")

    def has(self, part: str, setting: Setting) -> bool:
        return find(self.rows, part, setting) is not None

    def add(self, part: str, setting: Setting, seconds: float, **values: Sequence[float]) -> None:
        """values: of samples, such as prompts and seeds, that come in the same order for all settings"""
        rounded = {name: [round(float(value), DIGITS) for value in some] for name, some in values.items()}
        self._write({"part": part, **setting.fields, "seconds": round(seconds, 2), "values": rounded})

    def note(self, **facts: Any) -> None:
        """A row of what the others were measured with; raises `InputError` where that decides other numbers."""
        for known in (row["facts"] for row in of_part(self.rows, "facts")):
            for name in DECIDING:
                if known.get(name) != facts.get(name):
                    raise InputError(
                        f"{self.path} was measured with {name} {known.get(name)}, and this is {facts.get(name)}; "
                        "give that again, or choose another --out"
                    )
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
    found = estimate(values, RESAMPLES)
    assert found is not None, "each setting has samples"
    mean, low, high, _ = found
    # A single sample has no interval, and stands for itself.
    return mean, mean if low is None else low, mean if high is None else high


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """`interval` of how much more values are than others of the same samples."""
    return interval([one - other for one, other in zip(values, others, strict=True)])
