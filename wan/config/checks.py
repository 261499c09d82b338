"""What single values of settings may be, and errors that say what is allowed in place of others."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from nabla import InputError
from nabla.checks import is_count, is_number
from wan.files.plain_data import parse_json

SOLVERS = ("unipc", "dpm++", "euler")
MAX_STEPS = 1000
# Ten times what anyone uses; far beyond, numbers overflow on the way.
MAX_SHIFT = MAX_GUIDE_SCALE = 100
MAX_CONTEXT_SCALE = 10
# Characters of a text, a hundred times what text encoders take; some far longer ones take long to clean.
MAX_TEXT = 50_000
# Bytes of a name within a folder, and of a whole path.
MAX_NAME, MAX_PATH = 255, 4095


def parse_size(size: object) -> tuple[int, int]:
    """(width, height) from `1280*720`, `1280x720` or a pair."""
    if isinstance(size, str):
        parts = size.replace("x", "*").split("*")
        # Long numbers stay text, for which int() may raise an error of its own.
        size = [int(part) if part.isdecimal() and len(part) < 10 else part for part in parts]
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(map(is_count, size)):
        given = "*".join(map(str, size)) if isinstance(size, (list, tuple)) else size
        raise InputError(f"size {given!r} is not of the form width*height, such as 1280*720")
    return int(size[0]), int(size[1])


def parse_guide_scale(given: object) -> object:
    """A number, or a pair of them, from `5.0`, `3.0,4.0` or a list; what is none of these is left to be refused."""
    if isinstance(given, str):
        try:
            numbers = tuple(float(part) for part in given.split(","))
        except ValueError:
            return given
        return numbers[0] if len(numbers) == 1 else numbers
    return tuple(given) if isinstance(given, list) else given


def guide_scale_text(scale: float | Sequence[float]) -> str:
    """As a person reads and writes it: 5, or 3,4 of a pair."""
    return ",".join(f"{one:g}" for one in scale) if isinstance(scale, Sequence) else f"{scale:g}"


def check_sampling(solver: str, steps: int, shift: float, guide_scale: float | tuple[float, float]) -> None:
    """Raise `InputError` for a solver that is not known or numbers outside what is allowed."""
    if solver not in SOLVERS:
        raise InputError(f"solver {solver!r} is not known; use one of {', '.join(SOLVERS)}")
    if not is_count(steps) or not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps {steps!r} is not a whole number from 1 to {MAX_STEPS}; 50 is usual")
    if not is_number(shift) or not 0 < shift <= MAX_SHIFT:
        raise InputError(f"shift {shift!r} is not a positive number up to {MAX_SHIFT}; 5.0 is usual")
    several = isinstance(guide_scale, tuple)
    if isinstance(guide_scale, tuple) and len(guide_scale) != 2:
        raise InputError(
            f"guide_scale {list(guide_scale)} is not two numbers: of the low-noise expert, and of the high"
        )
    for scale in guide_scale if isinstance(guide_scale, tuple) else (guide_scale,):
        if not is_number(scale) or not 1 <= scale <= MAX_GUIDE_SCALE:
            raise InputError(
                f"guide_scale {scale!r} is not a number of at least 1 (1 means no guidance) and at most "
                f"{MAX_GUIDE_SCALE}; {'3.0,4.0' if several else '5.0'} is usual"
            )


def check_context_scale(scale: object) -> None:
    """Raise `InputError` unless a value can be what a source's part in a video is multiplied by."""
    if not is_number(scale) or not 0 <= scale <= MAX_CONTEXT_SCALE:
        raise InputError(f"context_scale {scale!r} is not a number from 0 to {MAX_CONTEXT_SCALE}; 1.0 is usual")


def absolute_path(name: str, file: object) -> str:
    """A path made absolute; raises `InputError` for a value that is none. There need not be a file."""
    if not isinstance(file, str) or not file:
        raise InputError(f"{name} {file!r} is not the path of a file")
    check_path(name, file)
    return os.path.abspath(os.path.expanduser(file))


def check_path(name: str, path: str) -> None:
    """Raise `InputError` for a text that no file's path can be; name: of the setting."""
    try:
        # Bytes of names that are not UTF-8, which Python has as surrogates, come back as they were; other surrogates
        # fail.
        content = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise InputError(f"{name} {path!r} is not valid Unicode ({error.reason}); retype it") from None
    if b"\0" in content:
        raise InputError(f"{name} {path!r} holds a null character, which no path can; retype it")
    longest = max(map(len, content.split(b"/")))
    if longest > MAX_NAME or len(content) > MAX_PATH:
        what = f"a name of {longest} bytes" if longest > MAX_NAME else f"a path of {len(content)} bytes"
        raise InputError(f"{name} {path!r} is too long: {what}; a name has at most {MAX_NAME}, a path {MAX_PATH}")


def check_text(name: str, text: object) -> None:
    """Raise `InputError` unless a value is text that can be written to a file."""
    if not isinstance(text, str):
        raise InputError(f"{name} {text!r} is not a text; put it in quotes")
    if len(text) > MAX_TEXT:
        raise InputError(f"{name} has {len(text)} characters; shorten it to a few hundred, the most is {MAX_TEXT}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid Unicode ({error.reason}); retype it") from None


def check_keys(where: str, given: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Raise `InputError` for the first key of a mapping that is not allowed; a list of those is named in its order."""
    if unknown := sorted(map(str, given.keys() - set(allowed))):
        known = sorted(allowed) if isinstance(allowed, Set) else allowed
        raise InputError(f"{where} has an unknown key {unknown[0]!r}; allowed are {', '.join(known)}")


def recordable(name: str, given: object) -> dict[str, Any] | None:
    """What numbers hold for as the sidecar of a video will have it, which must not fail when the video is made.

    Raises `InputError` for what is no mapping of plain values.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InputError(f"{name} {given!r} is not a mapping of what was measured")
    try:
        text = json.dumps(dict(given), allow_nan=False, ensure_ascii=False)
        # Lone surrogates pass as JSON and fail in a file. Read back, it meets the limits that a sidecar's reader has.
        text.encode("utf-8")
        return parse_json(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} cannot be written to a record ({error}); give plain values") from None
