"""Files of settings, those in `configs/` by name: YAML, and the JSON beside a video."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.config.checks import check_path
from wan.files.plain_data import read_json, read_yaml

# Within an installed package, or beside this one.
_HERE = Path(__file__).resolve().parents[1]
# Before a profile's file where an algorithm is written, as on a command line.
PROFILE = "profile:"
CONFIG_FOLDER = next((folder for folder in (_HERE / "configs",) if folder.is_dir()), _HERE.parent / "configs")


def read_settings(name: str | Path) -> dict[str, Any]:
    """A layer of settings from a YAML file, or from the JSON file beside a video.

    `name` is a path, or the name of a file in `configs/` whatever the working directory. A profile that it names may
    lie beside it.
    """
    path, content = _read(name)
    # A sidecar has its settings under a key, beside what it says of how the video was made.
    if path.suffix == ".json":
        content = content.get("settings") if isinstance(content, dict) else content
    # A YAML file of comments alone is an empty layer.
    if not isinstance(content, dict) and not (content is None and path.suffix != ".json"):
        raise InputError(f"config {path} does not hold a mapping of settings")
    return _with_profile_beside(path, content or {})


def profile_file(attention: Mapping[str, Any]) -> str | None:
    """The file of a profile that an `attention` mapping names, if it names one."""
    algorithm, profile = attention.get("algorithm"), attention.get("profile")
    if isinstance(algorithm, str) and algorithm.startswith(PROFILE):
        return algorithm.removeprefix(PROFILE)
    return profile if isinstance(profile, str) else None


def _with_profile_beside(path: Path, layer: dict[str, Any]) -> dict[str, Any]:
    """A layer whose profile, if it lies beside the config, is named by its whole path."""
    attention = layer.get("attention")
    if not isinstance(attention, Mapping) or (name := profile_file(attention)) is None:
        return layer
    check_path("attention profile", name)
    beside = path.absolute().parent / name
    if not os.path.isfile(beside):
        return layer
    key, text = ("profile", "") if isinstance(attention.get("profile"), str) else ("algorithm", PROFILE)
    return layer | {"attention": {**attention, key: f"{text}{beside}"}}


def read_made_with(name: str | Path) -> dict[str, Any]:
    """What the JSON file beside a video says of how it was made, besides its settings; of a YAML file nothing."""
    path, content = _read(name)
    made_with = content.get("made_with") if path.suffix == ".json" and isinstance(content, dict) else None
    return made_with if isinstance(made_with, dict) else {}


def _read(name: str | Path) -> tuple[Path, Any]:
    check_path("config", str(name))
    # Not by pathlib, which raises for a home that is not known.
    candidates: list[str | Path] = [os.path.expanduser(name), CONFIG_FOLDER / name]
    path = next((Path(path) for path in candidates if os.path.isfile(path)), None)
    if path is None:
        known = ", ".join(sorted(file.name for file in CONFIG_FOLDER.glob("*.yaml")))
        raise InputError(f"config {str(name)!r} is neither a file nor one of {known}")
    try:
        return path, (read_json if path.suffix == ".json" else read_yaml)(path)
    except (OSError, ValueError) as error:
        raise InputError(f"config {path} cannot be read: {' '.join(str(error).split())}") from None
