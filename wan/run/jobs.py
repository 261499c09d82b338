"""A file of prompts: a video for each line, and the names of videos."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.config.inputs import INPUTS, inputs_of
from wan.config.prompts import check_expanded, check_prompt
from wan.config.settings import Settings, resolve_sampling, resolve_video
from wan.files.hashes import text_hash
from wan.files.plain_data import parse_json, read_text
from wan.run.sidecars import comparable

# Where those stand in the schema of the YAML files that are in a section.
SECTION = {
    "negative_prompt": "sampling",
    "seed": "sampling",
    "context_scale": "sampling",
    "size": "video",
    "exact_size": "video",
    "frame_num": "video",
}
KEYS = ("prompt", *SECTION, *INPUTS, "expand_prompt", "name")

Layer = dict[str, Any]


def read_prompts(path: Path) -> list[tuple[Layer, str | None]]:
    """Settings that each line of a file of prompts makes, and the name that it gives its video's file, or None.

    A line is a prompt, or a JSON object with "prompt" and any of `KEYS`: files are paths as in all settings, and "name"
    has no ending; empty lines are skipped.
    Raises `InputError` with the line's number for anything else.
    """
    try:
        # Not splitlines, which cuts also at characters that a prompt may hold, such as U+2028.
        lines = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"prompt_file {path} cannot be read ({reason}); give a text file, a prompt a line") from None
    jobs = [(number, *_job(path, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not jobs:
        raise InputError(f"prompt_file {path} has no prompts; write one a line")
    numbers: dict[str, int] = {}
    for number, _, name in jobs:
        if name is not None and numbers.setdefault(name, number) != number:
            raise InputError(f"{path}, lines {numbers[name]} and {number}: both are named {name!r}; name one otherwise")
    return [(layer, name) for _, layer, name in jobs]


def _job(path: Path, number: int, line: str) -> tuple[Layer, str | None]:
    given: Layer = {"prompt": line.strip()}
    if line.lstrip().startswith("{"):
        try:
            given = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not a JSON object ({error})") from None
    if unknown := given.keys() - set(KEYS):
        raise InputError(f"{path}, line {number}: {sorted(unknown)[0]!r} is not known; use {', '.join(KEYS)}")
    name = given.pop("name", None)
    layer: Layer = {}
    for key, value in given.items():
        (layer.setdefault(SECTION[key], {}) if key in SECTION else layer)[key] = value
    try:
        # By themselves, so that the error can name the line; what they mean beside other settings is seen later.
        check_prompt(given.get("prompt"), "in this line")
        inputs_of(given)
        if given.get("expand_prompt") is not None:
            check_expanded(given["expand_prompt"], None)
        resolve_sampling(layer)
        resolve_video(layer)
    except InputError as error:
        raise InputError(f"{path}, line {number}: {error}") from None
    if name is None:
        return layer, None
    if not isinstance(name, str) or not _is_file_name(name):
        raise InputError(f"{path}, line {number}: name {name!r} is not a plain file name without a folder")
    # The ending follows from the number of frames, whatever the line says.
    return layer, re.sub(r"\.(mp4|png)$", "", name)


def _is_file_name(name: str) -> bool:
    # Surrogates and control characters are not printable.
    return name.isprintable() and Path(name).name == name and not name.startswith(".")


def words_of(prompt: str) -> str:
    """The first words of a prompt as part of a file name."""
    return re.sub(r"\W+", "-", prompt).strip("-")[:40].rstrip("-") or "video"


def name_of(settings: Settings) -> str:
    """A file name, without an ending, that belongs to what a video shows: its prompt, settings and seed."""
    # What a prompt was expanded to follows from the rest: made again from its record, a video has the same name.
    shown = replace(settings, expanded_prompt=None)
    what = json.dumps(comparable(shown), sort_keys=True, ensure_ascii=False)
    return f"{words_of(settings.prompt or '')}-{text_hash(what)[:8]}"


def names_of(every: Iterable[Settings]) -> list[str]:
    """The names of several videos, with a number for those that are asked for more than once."""
    seen: Counter[str] = Counter()
    names = []
    for name in map(name_of, every):
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names
