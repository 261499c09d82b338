"""Files of a checkpoint that cannot be read: which of them are damaged, and which only cannot be read here."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.files.plain_data import read_json

AGAIN = "download the checkpoint again"
# How libraries word a failed allocation where the error has no errno; `error 12)` is how Rust ends the line.
NO_MEMORY = ("cannot allocate", "can't allocate", "not enough memory", "unable to mmap", "bad_alloc", "error 12)")


class CheckpointError(InputError):
    """A checkpoint that is missing, incomplete, damaged or of another kind."""


def exists(path: Path) -> bool:
    """Whether a file or folder is there; raises `CheckpointError` if that cannot be known."""
    try:
        path.stat()
    # `Path.exists` would take what may not be looked at for missing, or raise, by the version of Python. A null byte
    # in the path is a ValueError.
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise CheckpointError(unreadable(path, error)) from None
    return True


def require_file(path: Path, remedy: str = AGAIN) -> None:
    """Raise `CheckpointError`, in words for what it is, unless a file is there and may be read."""
    if not exists(path):
        raise CheckpointError(f"{path} is missing; {remedy}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, and a file is needed there")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file that holds data, but a device or a pipe; give a file")
    try:
        # Libraries say of what may not be read that it is missing.
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from None


def unreadable(path: Path, error: Exception) -> str:
    """One line for a path that the operating system does not let this program read."""
    code = getattr(error, "errno", None)
    if isinstance(error, PermissionError):
        return f"{path} may not be read by this user ({os.strerror(code or errno.EACCES)}); give the right to read it"
    if is_out_of_memory(error):
        return (
            f"{path} cannot be opened: there is too little memory or address space for it; free some, "
            "or raise the limit ('ulimit -v')"
        )
    if code == errno.ENAMETOOLONG:
        return f"{path} is a longer name than a file can have; check the path"
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return f"{path} cannot be read ({reason}); check the path and the disk"


def is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, (OSError, RuntimeError)) and any(sign in text for sign in NO_MEMORY)


@contextmanager
def clear_errors(file: Path) -> Iterator[None]:
    """Turn whatever a library raises for a damaged file, and a pickle raises nearly anything, into one clear line.

    What the operating system or too little memory keeps from being read is said to be just that.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, OSError):
            raise CheckpointError(unreadable(file, error)) from error
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        # So safetensors, which parses its header strictly, says that a header names a type of number it does not know.
        if "unknown variant" in reason:
            kind = reason.partition("unknown variant")[2].partition(",")[0].strip()
            raise CheckpointError(
                f"{file} holds a type of tensor that is not read ({kind}); use a file in bfloat16, float16 or float32"
            ) from error
        raise CheckpointError(f"{file} is truncated or corrupt ({reason}); download it again") from error


def read_json_object(path: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint, or of something else that is mended by `remedy`."""
    require_file(path, remedy)
    try:
        content = read_json(path)
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; {remedy}")
    return content
