"""What the record of a video says of the files that it was made of: their names, and digests of what was in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.config.inputs import LISTS, VIDEOS, Files
from wan.files.hashes import file_hash
from wan.files.picture import picture_hash


def digest_of(name: str, path: str) -> str:
    """SHA-256 of a file of an input; raises `InputError` if it cannot be read."""
    if name not in VIDEOS:
        return picture_hash(path)
    try:
        return file_hash(Path(path))
    except OSError as error:
        raise InputError(f"{name} {path} cannot be read ({error.strerror}); give a file that is there") from None


def input_digests(name: str, given: Files) -> str | list[str]:
    """That of an input, or of each file of one that is several."""
    return digest_of(name, given) if isinstance(given, str) else [digest_of(name, path) for path in given]


def record_of(name: str, given: Files) -> Any:
    """What a record says of an input: a mapping with its name and digest, of one that is several a list of those."""
    if isinstance(given, str):
        return {"name": Path(given).name, "sha256": digest_of(name, given)}
    return [record_of(name, path) for path in given]


def recorded_digests(name: str, record: Any) -> str | list[str]:
    """`input_digests` off what a record says; raises `KeyError` or `TypeError` where it does not."""
    return [one["sha256"] for one in record] if name in LISTS else record["sha256"]


def recorded_otherwise(made_with: Mapping[str, Any], inputs: Mapping[str, Files]) -> list[str]:
    """The inputs of which a record has digests, and that are other files now."""
    others = []
    for name, given in inputs.items():
        try:
            then = recorded_digests(name, made_with[name])
        except (KeyError, TypeError):
            continue
        if then != input_digests(name, given):
            others.append(name)
    return others
