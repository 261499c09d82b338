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
