"""Videos made in every way that is compared, by one pipeline; what is made already is left as it is."""

from __future__ import annotations

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from wan.caches.applied import step_cache_of
from wan.config.settings import VideoSettings
from wan.files.hashes import file_hash
from wan.files.video import write_lossless, write_with_sidecar
from wan.models.attention import apply_attention
from wan.observe.recorder import Recorder
from wan.parallel.distributed import DistributedContext
from wan.run.generation import Made, make_frames
from wan.run.request import Options
from wan.run.sidecars import is_made
from wan.sampling.guided import GuidedPipeline
from wan.tools.evaluate.compared import Compared
from wan.tools.evaluate.folder import Folder
from wan.tools.evaluate.jobs import Job

log = logging.getLogger("wan")


class Task(NamedTuple):
    """A video in one way."""

    compared: Compared
    job: Job


def all_tasks(compared: Sequence[Compared], jobs: Sequence[Job]) -> list[Task]:
    """Setting by setting, since another one may have to be compiled."""
    return [Task(one, job) for one in compared for job in jobs]


def still_to_make(compared: Sequence[Compared], jobs: Sequence[Job], folder: Folder) -> list[Task]:
    """The tasks of which the folder does not have the video, or has lost the frames before they were measured."""
    return [task for task in all_tasks(compared, jobs) if not _is_done(task, compared, folder)]


def _is_done(task: Task, compared: Sequence[Compared], folder: Folder) -> bool:
    one, job = task
    if not is_made(folder.video(one, job), one.of(job.settings)):
        return False
    measured_with = [other for other in compared if not other.is_baseline] if one.is_baseline else [one]
    return folder.frames(one, job).exists() or all(folder.measures(other, job).exists() for other in measured_with)


def put_on(pipe: GuidedPipeline, one: Compared) -> None:
    """Have a pipeline run in a way that is compared, whatever way it ran before.

    Raises `InputError` for layers, windows and the like that its transformer does not have.
    """
    if one.cache is not None:
        pipe.transformer_spec.check_cache(one.cache.kind)
    if one.cache is not None or step_cache_of(pipe.transformer) is not None:
        # Only where there is one: step caches stand on private names of diffusers, which it may take away.
        from wan.caches.apply import apply_cache, remove_cache

        for transformer in pipe.transformers:
            remove_cache(transformer)
            if one.cache is not None:
                apply_cache(transformer, one.cache, pipe.transformer_spec)
    apply_attention(pipe.transformers, one.attention)


def check_all(pipe: GuidedPipeline, compared: Sequence[Compared], videos: Sequence[VideoSettings]) -> None:
    """Raise `InputError` for a setting that cannot run, before hours go into those ahead of it."""
    for one in compared:
        put_on(pipe, one)
        for video in videos:
            log.info("setting %s: %s", one.name, pipe.describe_attention(video))


def make_all(
    pipe: GuidedPipeline,
    tasks: Sequence[Task],
    folder: Folder,
    options: Options,
    loading: float,
    processes: DistributedContext | None = None,
) -> None:
    """Make the videos of tasks, each by the processes of a replica, and write them with their frames and records."""
    maker = _Maker(pipe, folder, options, loading)
    progress = Progress([task.compared.name for task in tasks])
    for number in range(len(tasks)) if processes is None else processes.claim_jobs(len(tasks)):
        start = time.perf_counter()
        made = maker.make(tasks[number])
        if made is not None:
            said = progress.after(number, time.perf_counter() - start)
            log.info("%s: %.1f s sampling; %s", _label(tasks[number]), made.seconds["sampling"], said)


def _label(task: Task) -> str:
    return f"{task.compared.name}, {task.job.name}"


class _Maker:
    """Makes one video after the other, and knows what the pipeline has run before."""

    def __init__(self, pipe: GuidedPipeline, folder: Folder, options: Options, loading: float):
        self.pipe, self.folder, self.options, self.loading = pipe, folder, options, loading
        self.now: Compared | None = None
        self.warm: set[tuple] = set()

    def make(self, task: Task) -> Made | None:
        """The video, written; None on a process that does not lead."""
        one, job = task
        if one != self.now:
            put_on(self.pipe, one)
            self.now = one
        recorder = Recorder(progress=True, timed=False)
        made = make_frames(self.pipe, one.of(job.settings), self.options, self.loading, recorder)
        # The first of a setting, and of a size, compiles, chooses and checks kernels.
        kind = one.name, job.settings.video.size, job.settings.video.frame_num
        is_warm = kind in self.warm
        self.warm.add(kind)
        if made is not None:
            self._write(task, made, {"kept": recorder.records[-1]["kept"], "warm": is_warm})
        return made

    def _write(self, task: Task, made: Made, found: dict) -> None:
        """Write the frames before the video: what has its record is whole."""
        frames, fps = self.folder.frames(*task), made.settings.video.fps
        write_lossless(frames, made.frames, fps)
        found["frames"] = {"name": frames.name, "sha256": file_hash(frames)}
        write_with_sidecar(self.folder.video(*task), made.frames, fps, made.record | {"evaluation": found})
        # Of frames that were there before, if of any.
        self.folder.measures(*task).unlink(missing_ok=True)


class Progress:
    """How far a run is, by what videos of each setting took. names: the settings of all its videos, in order"""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.taken: dict[str, list[float]] = defaultdict(list)

    def after(self, number: int, seconds: float) -> str:
        """What to say when the video of a number is done, which took so many seconds in all."""
        own = self.taken[self.names[number]]
        own.append(seconds)
        left = tqdm.format_interval(sum(map(self._usual, self.names[number + 1 :])))
        return f"{number + 1} of {len(self.names)}, {self._usual(self.names[number]):.1f} s a video, {left} left"

    def _usual(self, name: str) -> float:
        """Seconds a video: of the setting or, before it has any, of all. The first one's only while it is alone."""
        own = self.taken[name][1:] or self.taken[name]
        return statistics.mean(own or [one for taken in self.taken.values() for one in (taken[1:] or taken)])
