"""Components that lie elsewhere than a checkpoint: where someone says, or in a repository that many have them from."""

from __future__ import annotations

import functools
from pathlib import Path

from wan.checkpoints.file_errors import CheckpointError, exists
from wan.checkpoints.locate import CONFIG, download, find_folder
from wan.models.family import Companion


def given_folder(companion: Companion, given: str, family: str) -> Path:
    """The folder of a component in a directory or of a hub id that was given for it.

    What is given may be the component's own folder, or that of a checkpoint or repository which has it.
    Raises `CheckpointError` for a folder in which it is not, and for a hub id that cannot be had.
    """
    path, flag = Path(given).expanduser(), f"--{companion.name}"
    if path.is_file():
        raise CheckpointError(f"{companion.name} {given} is a file; give the folder that it lies in as {flag}")
    found = find_folder(given) or _download(companion, given, companion.name)
    inside = [found, *(found / name for name in (companion.inner, companion.name, companion.folder) if name)]
    folder = next((one for one in inside if exists(one / CONFIG)), None)
    if folder is None:
        raise CheckpointError(
            f"{found} has no {CONFIG} and so is no {companion.name} of {family}; give the folder of one as {flag}"
        )
    return folder


def companion_folder(companion: Companion, folder: Path) -> Path:
    """The folder of a component that the checkpoint in `folder` leaves to another repository."""
    what = f"{folder} has no {companion.folder}/, and {companion.name}"
    return _download(companion, companion.hub_id, what) / companion.inner


@functools.cache
def _download(companion: Companion, hub_id: str, what: str) -> Path:
    """Downloaded once a process: the hub is asked each time whether there is a newer one."""
    return download(hub_id, companion.patterns, what=what, remedy=f"pass --{companion.name} DIR")
