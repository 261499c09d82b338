"""The folder of an evaluation: where its files are, and what it is of, so that nothing else is ever mixed into it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.files.atomic import lock_folder
from wan.files.json_files import write_json
from wan.files.plain_data import read_json
from wan.files.video import LOSSLESS, check_encoder, check_writable, make_folder
from wan.run.sidecars import comparable
from wan.tools.evaluate.compared import Compared
from wan.tools.evaluate.jobs import Job

VERSION = 1
MANIFEST = "manifest.json"


class Folder:
    """Paths in the folder of an evaluation.

    videos: of every setting, each with its record beside it; frames: the same videos to the bit
    measures: what was measured of each
    """

    def __init__(self, path: Path):
        self.path = path
        self.manifest = path / MANIFEST
        self.results, self.table = path / "results.json", path / "table.md"
        self.sheet, self.beside, self.vbench = path / "sheet.png", path / "beside", path / "vbench"

    def video(self, one: Compared, job: Job) -> Path:
        return self.path / "videos" / one.name / f"{job.name}.mp4"

    def frames(self, one: Compared, job: Job) -> Path:
        return self.path / "frames" / one.name / f"{job.name}{LOSSLESS}"

    def measures(self, one: Compared, job: Job) -> Path:
        return self.path / "measures" / one.name / f"{job.name}.json"

    def prepare(self, compared: Sequence[Compared]) -> None:
        """Make what videos are written to, and raise `InputError` if they cannot be."""
        for kind in ("videos", "frames", "measures"):
            for one in compared:
                make_folder(self.path / kind / one.name, "out")
        check_writable(self.results, "--out")
        check_encoder(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep it for this process; raises `InputError` if another one has it."""
        make_folder(self.path, "out")
        with lock_folder(self.path):
            yield

    def claim(self, manifest: Mapping[str, Any]) -> None:
        """Have it be of what a manifest says, beside what it is of already.

        Raises `InputError` if it is of something else, or has files and no manifest.
        """
        known = self._read()
        if known is not None:
            self._check(known, manifest)
            merged = {key: _joined(known.get(key), value) for key, value in manifest.items()}
            manifest = {**known, **merged}
        if manifest != known:
            write_json(self.manifest, manifest)

    def _read(self) -> dict[str, Any] | None:
        make_folder(self.path, "out")
        if not self.manifest.exists():
            if any(not one.name.startswith(".") for one in self.path.iterdir()):
                raise InputError(f"out {self.path} has files that are none of an evaluation; choose another --out")
            return None
        try:
            known = read_json(self.manifest)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.manifest} cannot be read ({error}); choose another --out") from None
        if not isinstance(known, dict) or known.get("version") != VERSION:
            raise InputError(f"{self.manifest} is of another version of this program; choose another --out")
        return known

    def _check(self, known: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        differing = next(_differences(known, manifest, ()), None)
        if differing is None:
            return
        path, then, now = differing
        raise InputError(
            f"out {self.path} was made with {' '.join(path)} {_short(then)}, and this run has {_short(now)}; "
            "give that again, or choose another --out"
        )


def manifest_of(jobs: Sequence[Job], compared: Sequence[Compared], about: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation is of, as plain values. about: what else its videos depend on"""
    videos, models = {}, {}
    for job in jobs:
        plain = comparable(job.settings)
        # By number, so that another prompt in the same place is seen to be another.
        number = f"{job.prompt:03d}-{job.take}"
        videos[number] = {key: plain.pop(key) for key in ("prompt", "sampling", "video", *job.settings.inputs)}
        models = {key: value for key, value in plain.items() if key not in ("attention", "cache")}
    settings = {one.name: one.to_dict() for one in compared}
    content = {"version": VERSION, "model": models, "made_on": dict(about), "videos": videos, "settings": settings}
    # As it will be read back.
    return json.loads(json.dumps(content))


def _joined(known: Any, new: Any) -> Any:
    """What both say: prompts, seeds and settings may be added, and some left out for once."""
    if isinstance(known, dict) and isinstance(new, dict):
        return {**known, **{key: _joined(known.get(key), value) for key, value in new.items()}}
    return new


def _differences(known: Any, new: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Where both say something, and not the same."""
    if isinstance(known, Mapping) and isinstance(new, Mapping):
        # What is compared, and of what videos, may be more or less from run to run; all else is the same throughout.
        open_ended = path in (("videos",), ("settings",))
        for key in sorted(known.keys() & new.keys() if open_ended else known.keys() | new.keys()):
            if path == () and (key not in known or key not in new):
                continue
            yield from _differences(known.get(key), new.get(key), (*path, key))
    elif known != new:
        yield path, known, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."
