"""The one file of a small trainer's state: written whole, and read without running what is in it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nabla import InputError
from wan.files.atomic import atomic_path
from wan.training.write_errors import state_write

# A state that is cut, of another class, of other keys, shapes and types, in the order of what meets it.
DAMAGED = (RuntimeError, EOFError, ValueError, pickle.UnpicklingError, LookupError, TypeError, AttributeError)


def save_state(state: dict[str, Any], path: Path) -> None:
    """Raises `InputError` if the file cannot be written; the earlier one stays."""
    # Not by its path, of whose name torch would make one that it then refuses.
    with state_write(path), atomic_path(path) as partial, partial.open("wb") as file:
        torch.save(state, file)


def load_state(path: Path, device: torch.device, take: Callable[[dict[str, Any]], None]) -> None:
    """Give a state to what takes its parts over. Raises `InputError` for a damaged one, or of another model."""
    try:
        take(torch.load(path, map_location=device, weights_only=True))
    # The latter is a RuntimeError, which else would be taken for damage.
    except (InputError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); mend that, or remove it") from error
    except DAMAGED as error:
        raise InputError(
            f"{path} is damaged, or the state of another run ({reason_of(error)}); put back a copy of it, or remove it "
            "to train anew"
        ) from error


def reason_of(error: BaseException) -> str:
    """What is wrong with a state, in a few words of torch's."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values, or is cut"
    return " ".join(f"{type(error).__name__} {error}".split())[:200]


def check_step(state: dict[str, Any], steps: int) -> int:
    """The step of a state; raises `ValueError` unless it is one of a run of so many."""
    step = state["step"]
    if type(step) is not int or not 0 <= step <= steps:
        raise ValueError(f"its step is {step!r:.60}")
    return step
