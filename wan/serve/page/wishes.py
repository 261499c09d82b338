"""From the settings of the page to what a queue takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.config.settings import resolve
from wan.serve.jobs.job import Wish
from wan.serve.limits import Limits, Visitor
from wan.serve.page.pictures import PICTURES


def to_wish(layer: Mapping[str, Any], model: str, visitor: Visitor, limits: Limits) -> tuple[Wish, dict[str, bytes]]:
    """The wish for a video of settings, in the schema of the YAML files, and what is in its files, by their names.

    The pictures that were added go with the wish, for they lie where gradio removes them after a day.
    Raises `InputError` for settings that are not allowed or beyond the limits, and for a picture that is gone.
    """
    limits.check(resolve(layer))
    pictures = {name: Path(layer[name]) for name in PICTURES if layer.get(name) is not None}
    # By the settings' names: theirs could be those of files that a job comes to.
    inputs = {name: f"{name}{path.suffix.lower()}" for name, path in pictures.items()}
    rest = {name: value for name, value in layer.items() if name not in pictures}
    wish = Wish(model, rest, inputs, source=visitor.address, via="page")
    return wish, {inputs[name]: _read(path) for name, path in pictures.items()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        raise InputError(f"picture {path.name} is no longer here; add it again") from None
