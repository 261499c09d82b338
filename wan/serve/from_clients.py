"""What settings of clients may be: those that name no file. Files and texts of users are data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nabla import InputError
from wan.config.config_files import profile_file


def check_names_no_file(layer: Mapping[str, Any]) -> None:
    """Raise `InputError` for settings that would be read from a file, whose path anyone may have chosen.

    Before they are resolved, which opens the file, and whose errors would tell what is there.
    """
    cache = layer.get("cache")
    ratios = cache.get("ratios") if isinstance(cache, Mapping) else None
    if isinstance(ratios, str) or (isinstance(cache, str) and cache.count(":") > 1):
        raise InputError("cache names a file of ratios; give the numbers, as the JSON file beside a video has them")
    attention = layer.get("attention")
    if isinstance(attention, Mapping) and profile_file(attention) is not None:
        raise InputError("attention names a file of a profile; give it whole, as the JSON file beside a video has it")
