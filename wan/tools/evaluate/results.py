"""What came out: of every setting, and beside the one that others are held against, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from wan.tools.evaluate.bootstrap import DRAWS, LEVEL, Estimate, by_prompt, estimate
from wan.tools.evaluate.compared import DENSE, Compared
from wan.tools.evaluate.folder import Folder
from wan.tools.evaluate.jobs import Job
from wan.tools.evaluate.making import Task
from wan.tools.evaluate.measuring import Instruments, read_measures, read_record

VERSION = 1
MEASURES = ("kept", "seconds", "psnr", "ssim", "lpips", "clip")
MEANING = {
    "kept": "share of key blocks attended to, mean over heads, layers and steps; 1 is dense",
    "seconds": "of sampling, without loading, text, decoding, and a setting's first video of a run, which compiles",
    "psnr": "dB to the dense video of the same seed, of whole videos; 100 if equal",
    "ssim": "to the dense video of the same seed, 1 if equal",
    "lpips": "to the dense video of the same seed, 0 if equal",
    "clip": "100 times the cosine of frames and prompt, at least 0",
}

# The values of a video by the names of `MEASURES`, as far as it has them.
Values = dict[str, float]


def collect(compared: Sequence[Compared], jobs: Sequence[Job], folder: Folder) -> dict[Task, Values]:
    """What is known of each video that is made."""
    found = {}
    for task in (Task(one, job) for one in compared for job in jobs):
        record = read_record(folder, task)
        if record is not None:
            found[task] = values_of(record, read_measures(folder, task))
    return found


def values_of(record: Mapping[str, Any], measures: Mapping[str, Any]) -> Values:
    """Of a video, from its record and what was measured."""
    said = record["evaluation"]
    values = {name: measures[name] for name in MEASURES if name in measures}
    if said["kept"] is not None:
        values["kept"] = said["kept"]
    if said["warm"]:
        values["seconds"] = record["made_with"]["seconds"]["sampling"]
    return values


def results_of(
    compared: Sequence[Compared],
    jobs: Sequence[Job],
    folder: Folder,
    against: Compared,
    instruments: Instruments,
    made_on: Mapping[str, Any],
) -> dict[str, Any]:
    """All of it as plain values, whose keys are always the same."""
    found = collect(compared, jobs, folder)
    return {
        "version": VERSION,
        "made_on": dict(made_on),
        "prompts": len({job.prompt for job in jobs}),
        "seeds": len({job.take for job in jobs}),
        "interval": {"level": LEVEL, "draws": DRAWS, "unit": "prompt"},
        "measures": MEANING,
        "how": instruments.how(is_baseline=False),
        "missing": _missing(instruments, found),
        "against": against.name,
        "settings": [_setting(one, jobs, found) for one in compared],
        "differences": [_difference(one, against, jobs, found) for one in compared if one != against],
        "videos": [_video(task, values, folder) for task, values in found.items()],
    }


def _missing(instruments: Instruments, found: Mapping[Task, Values]) -> dict[str, str]:
    """Why measures are not there, of those that some video lacks: an earlier run may have been able to take them."""
    lacking = {
        name
        for task, values in found.items()
        for name in instruments.missing
        if name not in values and not (task.compared.is_baseline and name == "lpips")
    }
    return {name: why for name, why in instruments.missing.items() if name in lacking}


def _setting(one: Compared, jobs: Sequence[Job], found: Mapping[Task, Values]) -> dict[str, Any]:
    own = [(job, found[Task(one, job)]) for job in jobs if Task(one, job) in found]
    measures = {
        name: _plain(estimate(by_prompt((job.prompt, values[name]) for job, values in own if name in values)))
        for name in MEASURES
    }
    return {"name": one.name, **one.to_dict(), "videos": len(own), **measures, "speedup": _speedup(one, jobs, found)}


def _speedup(one: Compared, jobs: Sequence[Job], found: Mapping[Task, Values]) -> float | None:
    """How many times as fast as the baseline, over the videos of which both have times."""
    pairs = list(_pairs("seconds", one, DENSE, jobs, found))
    own, dense = (math.fsum(pair[number] for _, *pair in pairs) for number in (0, 1))
    return dense / own if own else None


def _difference(one: Compared, against: Compared, jobs: Sequence[Job], found: Mapping[Task, Values]) -> dict[str, Any]:
    """A setting minus the one that it is held against, video by video, so that what prompts differ in cancels."""
    measures = {}
    for name in MEASURES:
        pairs = _pairs(name, one, against, jobs, found)
        measures[name] = _plain(estimate(by_prompt((prompt, own - other) for prompt, own, other in pairs)))
    return {"name": one.name, "against": against.name, **measures}


def _pairs(
    name: str, one: Compared, other: Compared, jobs: Sequence[Job], found: Mapping[Task, Values]
) -> list[tuple[int, float, float]]:
    """By prompts, a measure of the videos that two settings have both."""
    both = ((job, found.get(Task(one, job), {}), found.get(Task(other, job), {})) for job in jobs)
    return [(job.prompt, own[name], its[name]) for job, own, its in both if name in own and name in its]


def _video(task: Task, values: Values, folder: Folder) -> dict[str, Any]:
    one, job = task
    about = {"setting": one.name, "name": job.name, "prompt": job.settings.prompt, "seed": job.settings.sampling.seed}
    path = folder.video(one, job).relative_to(folder.path).as_posix()
    return about | {"file": path} | {name: values.get(name) for name in MEASURES}


def _plain(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else found._asdict()
