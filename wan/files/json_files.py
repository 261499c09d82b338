"""JSON as the program writes it: a value a file for people to read, or a value a line while something runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wan.files.atomic import atomic_path


def to_json(content: Mapping[str, Any]) -> str:
    """Indented text. Raises `ValueError` and `TypeError` for what JSON has no words for, such as NaN."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of `to_json`, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(to_json(content), encoding="utf-8")


def to_line(content: Mapping[str, Any]) -> str:
    """One line of a .jsonl file. Raises as `to_json` does."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def complete_lines(path: Path) -> Iterator[str]:
    """The lines of a .jsonl file one by one, without a last one that was cut while it was written."""
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if line.endswith("\n"))
