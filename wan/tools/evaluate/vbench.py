"""Folders that VBench (github.com/Vchitect/VBench) reads as they are: the same videos by names that it expects."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence

from wan.files.atomic import atomic_path, remove
from wan.files.json_files import write_json
from wan.files.video import make_folder
from wan.tools.evaluate.compared import Compared
from wan.tools.evaluate.folder import Folder
from wan.tools.evaluate.jobs import Job

MAX_BYTES = 255


def write_folders(compared: Sequence[Compared], jobs: Sequence[Job], folder: Folder) -> None:
    """A folder of each setting, with nothing but videos named `PROMPT-NUMBER.mp4`, and `SETTING.json` beside it.

    That gives the prompt of each file, as VBench's `--prompt_file` takes it. Numbers count a prompt's videos, from 0.
    """
    names = names_of(jobs)
    make_folder(folder.vbench, "out")
    for one in compared:
        made = [(job, name) for job, name in zip(jobs, names) if folder.video(one, job).is_file()]
        if not made:
            continue
        with atomic_path(folder.vbench / one.name) as partial:
            partial.mkdir()
            for job, name in made:
                _link(folder.video(one, job), partial / name)
            # That of an earlier run, for no folder takes the place of one with files in it.
            remove(folder.vbench / one.name)
        write_json(folder.vbench / f"{one.name}.json", {name: job.settings.prompt for job, name in made})


def names_of(jobs: Sequence[Job]) -> list[str]:
    """The file name of each job's video."""
    counts: Counter[str] = Counter()
    names = []
    for job in jobs:
        prompt = job.settings.prompt or ""
        name = f"{prompt}-{counts[prompt]}.mp4"
        counts[prompt] += 1
        # What cannot be a name is called as it is elsewhere; the JSON file beside the folder has the prompt.
        unfit = "/" in prompt or prompt.startswith(".") or not prompt.isprintable()
        names.append(f"{job.name}.mp4" if unfit or len(os.fsencode(name)) > MAX_BYTES else name)
    return names


def _link(video: os.PathLike, path: os.PathLike) -> None:
    try:
        os.link(video, path)
    # A file system without links, or with few of them.
    except OSError:
        shutil.copyfile(video, path)
