"""What jobs are made from and come to, a folder a job."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from nabla import InputError
from wan.files.atomic import atomic_path, remove, sync
from wan.files.video import make_folder
from wan.serve.jobs.store import StorageError

log = logging.getLogger("wan")

# What a video and the pictures of it are, by the endings of their names.
MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".webp": "image/webp"}
ID = re.compile(r"video_[0-9a-f]{32}")
# A folder without a job may be of one that is just taken in, by another process too: files come first.
YOUNG_SECONDS = 600


class JobFiles:
    """The folders of jobs, in one folder, which is made if it is not there; raises `InputError` if that cannot be."""

    def __init__(self, folder: Path):
        make_folder(folder)
        self.folder = folder

    def path(self, job_id: str, name: str) -> Path:
        """Where a file of a job lies, if it is there. Raises `ValueError` for what is no id, and no name of a file."""
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"{name!r} is not a name of a file")
        return self._folder(job_id) / name

    def keep(self, job_id: str, files: Mapping[str, bytes]) -> None:
        """Write files by their names, each whole or not at all, all on the disk at the end. Raises `StorageError`."""
        folder = self._folder(job_id)
        try:
            if files and not folder.exists():
                folder.mkdir(exist_ok=True)
                # Else a power cut could leave the job without it.
                sync(self.folder)
            for name, content in files.items():
                with atomic_path(self.path(job_id, name)) as partial:
                    partial.write_bytes(content)
        except (InputError, OSError) as error:
            reason = getattr(error.__cause__ or error, "strerror", None) or "it cannot be written"
            raise StorageError(f"the server cannot keep the files of a job ({reason})") from error

    def read(self, job_id: str, name: str) -> bytes:
        """What is in a file. Raises `FileNotFoundError`."""
        return self.path(job_id, name).read_bytes()

    def delete(self, job_id: str) -> None:
        """Remove the files of a job that is no more.

        Whoever makes it may write there, or remove them too, until it hears so; what is left then is swept.
        """
        try:
            remove(self._folder(job_id))
        except OSError as error:
            log.info("%s is not removed yet: %s", job_id, error.strerror)

    def sizes(self) -> dict[str, int]:
        """Bytes that the files of each job hold, by its id."""
        return {folder.name: _bytes_in(folder) for folder in self._folders()}

    def sweep(self, has_job: Callable[[str], object]) -> None:
        """Remove folders of jobs that are no more, such as of a process that was killed while it deleted one."""
        for folder in self._folders():
            # Another may remove it at the same time.
            with suppress(FileNotFoundError):
                is_old = time.time() - folder.stat().st_mtime > YOUNG_SECONDS
                if is_old and not has_job(folder.name):
                    self.delete(folder.name)

    def _folder(self, job_id: str) -> Path:
        if not ID.fullmatch(job_id):
            raise ValueError(f"{job_id!r} is not an id of a job")
        return self.folder / job_id

    def _folders(self) -> Iterator[Path]:
        return (path for path in self.folder.iterdir() if ID.fullmatch(path.name))


def _bytes_in(folder: Path) -> int:
    """What a folder's files hold, of which others may be removed meanwhile."""
    try:
        return sum(file.lstat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0
