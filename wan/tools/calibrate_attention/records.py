"""The file of measurements beside a profile: a JSON object a line, so that a run that was cut goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nabla import InputError
from wan.files.atomic import atomic_path, written
from wan.files.json_files import complete_lines, to_line
from wan.files.plain_data import parse_json

Record = dict[str, Any]
SETTINGS, COST, VIDEO, LAYER, CHECK = "settings", "cost", "video", "layer", "check"
# Enough to say what is another one.
LETTERS = 80


class Forward(NamedTuple):
    """One forward of a walk: of which prompt, in which of its steps, and which of the step's guidance branches."""

    prompt: int
    step: int
    branch: int


class Records:
    """What is measured by now, and where it is written.

    settings: all that measurements depend on, as JSON has it
    Raises `InputError` for a file of other settings, and for one that is none.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self.lines = list(_read(path)) if path.is_file() else []
        if self.lines:
            _check_same(path, self.lines[0], settings)
            # Without a line that was cut, to which the next one would be joined.
            self._rewrite()
        else:
            self.lines = [{"kind": SETTINGS, **settings}]
            self._rewrite()

    def add(self, kind: str, **values: Any) -> None:
        """Write a measurement; it is on the file when this returns."""
        line = {"kind": kind, **values}
        with written(self.path, "free some space, and start again: what is there is not measured again"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_line(line))
        self.lines.append(line)

    def of(self, kind: str) -> list[Record]:
        return [line for line in self.lines if line["kind"] == kind]

    def one(self, kind: str) -> Record | None:
        """The only measurement of a kind, if it is there."""
        return next(iter(self.of(kind)), None)

    def layers_of(self, forward: Forward) -> set[int]:
        """Which layers are measured in a forward."""
        return {line["layer"] for line in self.of(LAYER) if forward_of(line) == forward}

    def _rewrite(self) -> None:
        with atomic_path(self.path) as partial:
            partial.write_text("".join(map(to_line, self.lines)), encoding="utf-8")


def forward_of(line: Mapping[str, Any]) -> Forward:
    return Forward(*(line[name] for name in Forward._fields))


def _read(path: Path) -> Iterator[Record]:
    try:
        for number, text in enumerate(complete_lines(path), 1):
            line = parse_json(text)
            if not isinstance(line, dict) or "kind" not in line or (number == 1) != (line["kind"] == SETTINGS):
                raise ValueError(f"line {number} is no measurement")
            yield line
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is no file of measurements ({error}); remove it, or choose another --measurements"
        ) from None


def _check_same(path: Path, there: Record, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if there.get(name) != value:
            before, now = (str(one)[:LETTERS] for one in (there.get(name), value))
            raise InputError(
                f"{path} was measured with {name} {before}, and this is {now}; "
                "choose another --measurements, or remove that file"
            )
