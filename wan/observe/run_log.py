"""A log of a generation: a JSON object a line, written as the run goes, whole lines only."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.files.json_files import complete_lines, to_line
from wan.files.video import check_writable

log = logging.getLogger("wan")

ENDING = ".jsonl"


class RunLog:
    """Replaces the file at `path` by an empty one to write events to.

    A disk that is full ends the log, with a warning, and not the video, which may have taken hours.
    """

    def __init__(self, path: Path):
        self.path, self.ended = path, False
        self._put("w", "")

    def write(self, events: list[dict[str, Any]]) -> None:
        self._put("a", "".join(map(to_line, events)))

    def _put(self, mode: str, text: str) -> None:
        if self.ended:
            return
        # Where the whole lines end, to go back to.
        size = self.path.stat().st_size if mode == "a" and self.path.exists() else 0
        try:
            # Opened anew each time: lines that were written are the file's, even if the program is killed.
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self.ended = True
            log.warning("warning: the log %s ends here (%s)", self.path, error.strerror or error)
            self._cut(size)

    def _cut(self, size: int) -> None:
        """Take back what was written of lines that are not whole."""
        try:
            with self.path.open("r+b") as file:
                file.truncate(size)
        except OSError as error:
            log.warning("warning: the last line of %s may be cut (%s)", self.path, error.strerror or error)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The events of a log, without a last line that is not whole."""
    return [json.loads(line) for line in complete_lines(Path(path))]


def check_log(path: Path) -> None:
    """Raise `InputError` unless a log can be written to `path`."""
    if path.suffix != ENDING:
        raise InputError(f"log {path} must end in {ENDING}")
    check_writable(path, "--log_file")
