"""Files and folders that are there whole or not at all, whenever a program is cut, and folders that are one's alone."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from nabla import InputError

log = logging.getLogger("wan")

PARTIAL = ".partial-"
LOCK = ".lock"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` for a file or a new folder, which takes its place if the body succeeds, else is removed.

    What an earlier program that was killed left there half-written is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(PARTIAL + path.name)
    remove(partial)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        remove(partial)
        raise


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hold(folder: Path) -> TextIO:
    """A file in a folder that keeps it for this process until the file is closed or the process ends, in any way.

    Raises `InputError` if another process holds the folder. One on a file system without locks is not held, and the
    log says so.
    """
    file = (folder / LOCK).open("a")
    try:
        # Not flock, whose lock a process that was forked would hold on after this one was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise InputError(
            f"{folder} is in use by another run; wait for its end, stop it, or choose another out"
        ) from None
    except OSError as error:
        log.warning("warning: %s cannot be locked (%s); start no other run in it", folder, error.strerror)
    return file
