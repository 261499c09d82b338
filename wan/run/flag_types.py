"""What flags are read as that are more than a word or a number. Imports nothing heavy."""

from __future__ import annotations

import argparse
import re


def boolean(text: str) -> bool:
    """The type of a flag that says whether."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def scales(text: str) -> float | list[float]:
    """The type of a flag that is a number, or two with a comma between: of low noise and of high."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor low and high noise's, such as 3.0,4.0")
    return numbers if len(numbers) == 2 else numbers[0]


def files(text: str) -> list[str]:
    """The type of a flag of one file or more, with commas between."""
    found = [file.strip() for file in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} lacks the name of a file; give FILE, or FILE,FILE")
    return found


def transformers(given: list[str] | None) -> str | dict[str, str] | None:
    """What --transformer was given, as a setting: a file, or one by the name of each expert."""
    if given is None:
        return None
    named = [re.fullmatch(r"(?:(high|low):)?(.*)", one, re.DOTALL) for one in given]
    pairs = [(found[1], found[2]) for found in named if found is not None]
    if [expert for expert, _ in pairs] == [None]:
        return pairs[0][1]
    experts = {expert: file for expert, file in pairs if expert is not None}
    if len(experts) < len(pairs):
        raise ValueError(f"transformer {', '.join(given)}: give one file, or high:FILE and low:FILE, each once")
    return experts


def duration(text: str) -> float:
    """The type of a flag that says for how long, in seconds: 30m, 12h, 7d."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)([smhd])", text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time, such as 30m, 12h or 7d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def span(text: str) -> tuple[int, int]:
    """The type of a flag that is a count, or the least and the most of one: 4, or 0-4."""
    found = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor two of them, such as 0-4")
    return int(found[1]), int(found[2] or found[1])
