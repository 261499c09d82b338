"""Files and folders that are there whole or not at all, whenever a program is cut, and folders that are one's alone."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from nabla import InputError
from wan.files.hashes import text_hash

log = logging.getLogger("wan")

PARTIAL = ".partial-"
# The name says whose the file is, since a program that is killed leaves no other word.
MARK = re.compile(rf"{re.escape(PARTIAL)}(?P<host>[0-9a-f]{{6}})-(?P<process>\d+)-")
LOCK = ".lock"


@contextmanager
def atomic_path(path: Path, remedy: str = "free some space, or choose another place") -> Iterator[Path]:
    """A path beside `path` for a file or a new folder, which takes its place if the body succeeds, else is removed.

    It is on the disk before it takes the place, and has the permissions that the umask gives. What earlier programs
    that were killed left half-written in that folder is removed first. Raises `InputError`, with a remedy, if the
    operating system will not write it.
    """
    # Not by its name, which may be as long as names can be.
    partial = path.with_name(_mark() + text_hash(os.fsencode(path.name))[:8])
    with written(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        # What an earlier process with this one's number left is to `sweep` a file of one that runs.
        remove(partial)
        try:
            yield partial
            settle(partial)
            # Synced before the rename, lest a crash leave a name without its content, and the folder of names after it.
            os.replace(partial, path)
            sync(path.parent)
        except BaseException:
            remove(partial)
            raise


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder in a folder, for files that are moved into place when all are whole; it is removed in any case.

    What earlier programs that were killed left there is removed first. Raises `OSError`.
    """
    sweep(folder)
    own = Path(tempfile.mkdtemp(prefix=_mark(), dir=folder))
    try:
        yield own
    finally:
        remove(own)


@contextmanager
def written(path: Path, remedy: str) -> Iterator[None]:
    """Turn what an operating system or safetensors raises for a file that cannot be written into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); {remedy}") from error
    except SafetensorError as error:
        # So its library words an operating system's error; others are bugs.
        if "I/O error" not in str(error):
            raise
        raise InputError(f"{path} cannot be written ({error}); {remedy}") from error


def sweep(folder: Path) -> None:
    """Remove what programs of this machine that have ended left half-written in a folder."""
    for left in folder.glob(f"{PARTIAL}*"):
        marked = MARK.match(left.name)
        # Another machine that shares the folder has processes of its own, whose numbers mean nothing here.
        if marked and marked["host"] == _host() and not _runs(int(marked["process"])):
            # Another process may remove it at the same time, and in a folder for all it may be another user's.
            with suppress(OSError):
                remove(left)


def _mark() -> str:
    """Whose half-written file a name is: the host's, as a few letters, and the process's."""
    return f"{PARTIAL}{_host()}-{os.getpid()}-"


def _host() -> str:
    return text_hash(platform.node())[:6]


def _runs(process: int) -> bool:
    try:
        # Signal 0 is not sent; the call only says whether there is such a process.
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # Such as that it is another user's: there is one.
    except OSError:
        return True
    return True


def _umask() -> int:
    """The process's, which can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def settle(path: Path) -> None:
    """Have all of a file or folder on the disk, readable to whom the umask lets: safetensors gives its owner alone."""
    if path.is_symlink():
        return
    mask = _umask()
    # A folder after what is in it, since the sync of a folder is of names alone.
    for one in [*path.rglob("*"), path] if path.is_dir() else [path]:
        # `chmod` and `open` would follow a link to a file that is not this program's.
        if one.is_symlink():
            continue
        one.chmod((0o777 if one.is_dir() else 0o666) & ~mask)
        sync(one)


def sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some file systems cannot sync a folder, and what was written there is as safe as it gets.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class FolderInUse(InputError):
    """Another process holds a folder."""


def lock_folder(folder: Path) -> TextIO:
    """A file in a folder that keeps it for this process until the file is closed or the process ends, in any way.

    Raises `FolderInUse` if another process holds the folder. One on a file system without locks is not held, and the
    log says so.
    """
    file = (folder / LOCK).open("a")
    try:
        # Not flock, whose lock a process that was forked would hold on after this one was killed.
        # Its price: this process would give it up by closing any other descriptor of the file.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # POSIX lets either error say that another process holds the lock.
    except (BlockingIOError, PermissionError):
        file.close()
        raise FolderInUse(
            f"{folder} is in use by another run; wait for its end, stop it, or choose another folder"
        ) from None
    except OSError as error:
        log.warning("warning: %s cannot be locked (%s); start no other run in it", folder, error.strerror)
    return file
