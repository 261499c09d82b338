"""Whether what a name stands for is an ordinary file, found out without opening what would be waited for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nabla import InputError


def check_ordinary(path: str | Path, name: str, give: str) -> None:
    """Raise `InputError` for what is no ordinary file, such as a folder or a pipe, or cannot be opened.

    name: as the message calls it; give: what it says to do
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb"):
                return
    except (OSError, ValueError) as error:
        raise unreadable(name, error, give) from None
    raise InputError(f"{name} is {'a folder' if stat.S_ISDIR(mode) else 'no ordinary file'}; {give}")


def unreadable(name: str, error: Exception, give: str) -> InputError:
    """The error of a file that cannot be read, for the reason that another gives."""
    return InputError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error}); {give}")
