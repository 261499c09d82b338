"""Files that a program of ours has measured, as settings name them: by path, or by name among those that come along."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.config.checks import check_path


def read_measured(
    what: str, name: str, folder: Path, reader: Callable[[Path], Any], key: str, program: str
) -> Mapping[str, Any]:
    """What such a file says, read by `reader`; raises `InputError` for one that cannot be read, or that has no `key`.

    what: as messages call it; folder: of those that come along; program: that writes such files
    """
    check_path(what, name)
    path = Path(os.path.expanduser(name))
    if not os.path.isfile(path) and os.path.isfile(folder / name):
        path = folder / name
    try:
        content = reader(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping) or key not in content:
        raise InputError(f"{what} {path} has no {key!r}; write it with {program}")
    return content
