"""The page's one pipeline, and the videos that are asked of it, made in turn."""

from __future__ import annotations

import gc
import logging
import math
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan.checkpoints.lora import read_lora
from wan.config.settings import Settings, resolve, writers_of
from wan.files.video import make_folder
from wan.models.attention import apply_attention
from wan.models.checkpoint import Checkpoint
from wan.observe.observer import Observer
from wan.observe.progress import Pace
from wan.parallel.distributed import pick_device
from wan.run.advice import unexpected
from wan.run.generation import generate_video, load_pipeline
from wan.run.outputs import check_output
from wan.run.request import Options, Request
from wan.run.settle import settle
from wan.sampling.guided import GuidedPipeline
from wan.sampling.loop import Cancelled
from wan.serve.limits import NOBODY, USUAL_LIMITS, Limits, Line, Visitor, check_waiting
from wan.serve.preview import Preview

log = logging.getLogger("wan")

# How often a job that waits is looked at, for its place in the line may change.
LOOK_SECONDS = 0.5

WAITING, LOADING, READING = "Waiting", "Loading the model", "Reading the prompt"
SAMPLING, DECODING, WRITING = "Sampling", "Decoding", "Writing"


@dataclass(frozen=True)
class JobProgress:
    """How far a video is. ahead: videos before it; seconds_left: of sampling; notes: what its user should know.

    stopping: whether it was cancelled, and waits for what runs to end
    """

    stage: str
    ahead: int = 0
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    preview: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    stopping: bool = False


@dataclass(frozen=True)
class JobResult:
    """A video that is made: its file, whose sidecar lies beside it, and the settings, with the seed that was drawn."""

    path: Path
    settings: Settings
    seconds: float

    @property
    def sidecar(self) -> Path:
        return self.path.with_suffix(".json")


class Job:
    """One video that was asked for: the settings, in the schema of the YAML files, and by whom."""

    def __init__(self, layer: dict[str, Any], visitor: Visitor) -> None:
        self.layer = layer
        self.visitor = visitor
        self.progress = JobProgress(WAITING)
        self.future: Future[JobResult] = Future()
        self._stopped = threading.Event()
        self._changed = threading.Event()
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """End it: at once if it waits, else once what runs has ended: the load, the prompt, the step, the decoding.

        Nothing happens to one that has ended, or is being written.
        """
        self._stopped.set()
        self.future.cancel()
        self.tell(stopping=True)

    def check(self) -> None:
        """Raise `Cancelled` if that is wished."""
        if self._stopped.is_set():
            raise Cancelled

    def tell(self, **progress: Any) -> None:
        """Change what its progress says."""
        with self._lock:
            self.progress = replace(self.progress, **progress)
        self._changed.set()

    def changes(self) -> Iterator[JobProgress]:
        """Its progress whenever that changed or some time has passed, until it has ended."""
        while not self.future.done():
            yield self.progress
            self._changed.wait(LOOK_SECONDS)
            self._changed.clear()

    def result(self) -> JobResult:
        """What it came to, once it has ended; raises what went wrong, or `Cancelled`."""
        try:
            return self.future.result()
        except CancelledError:
            raise Cancelled from None


class Studio:
    """Makes videos with one pipeline, one at a time; leave it as a context to end what runs.

    folder: of videos and their sidecars
    limits: of what is asked
    """

    def __init__(self, options: Options, folder: Path, default_checkpoint: str, limits: Limits = USUAL_LIMITS):
        make_folder(folder)
        self.options = options
        self.device = pick_device(options.device)
        self.folder = folder
        self.default_checkpoint = default_checkpoint
        self.limits = limits
        self._pipe: GuidedPipeline | None = None
        self._weights: tuple = ()
        # What the pipeline's plan of memory was made for, see `_needs`, and what it was loaded to write.
        self._planned = 0, 0, False
        self._writes = False, False
        # All that have not ended, and those of them that wait.
        self._jobs: list[Job] = []
        self._line = Line()
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="studio")

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        # A copy, since each job that is cancelled leaves the list.
        for job in list(self._jobs):
            job.cancel()
        self._worker.shutdown()

    def submit(self, layer: dict[str, Any], visitor: Visitor = NOBODY) -> Job:
        """Ask for the video of settings in the schema of the YAML files; visitors take turns.

        Raises `InputError` if settings are not allowed or beyond the limits, and if too many videos wait.
        """
        self.limits.check(resolve(layer, {"checkpoint": self.default_checkpoint}))
        job = Job(layer, visitor)
        with self._lock:
            check_waiting([one.visitor for one in self._jobs], visitor)
            self._jobs.append(job)
            self._line.join(job)
            self._tell_places()
        # Outside the lock: of a job that was cancelled already it calls `_forget` at once, which takes the lock.
        job.future.add_done_callback(lambda _: self._forget(job))
        self._worker.submit(self._make_next)
        return job

    def cancel(self, visitor: Visitor) -> None:
        """Cancel all jobs of a visitor."""
        with self._lock:
            jobs = [job for job in self._jobs if job.visitor == visitor]
        # The last first, so that none begins.
        for job in reversed(jobs):
            job.cancel()

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._jobs.remove(job)
            self._line.leave(job)
            self._tell_places()

    def _tell_places(self) -> None:
        order = self._line.order()
        running = len(self._jobs) - len(order)
        for ahead, job in enumerate(order, running):
            job.tell(ahead=ahead)

    def _make_next(self) -> None:
        """Make the video whose turn it is, if one waits: those that were cancelled left a call too many."""
        with self._lock:
            job = self._line.next()
        # From here on cancelling the future does nothing: a job that runs sees `check`.
        if job is None or not job.future.set_running_or_notify_cancel():
            return
        try:
            made = self._make(job.layer, job)
        except BaseException as error:
            job.future.set_exception(error)
        else:
            job.future.set_result(made)

    def _make(self, layer: dict[str, Any], job: Job) -> JobResult:
        start = time.perf_counter()
        job.tell(stage=LOADING)
        request = Request(layer, config=None, task=None, default_checkpoint=self.default_checkpoint)
        checkpoint, [(settings, name)] = settle(request, self.device)
        self.limits.check(settings)
        settings = settings.with_seed()
        # The same settings may be asked for again, and no video takes another's place.
        path = self.folder / f"{name.stem}-{secrets.token_hex(3)}{name.suffix}"
        check_output(path, settings)
        notes = tuple(unexpected(checkpoint, settings))
        for line in notes:
            log.warning("warning: %s", line)
        job.tell(notes=notes)
        job.check()
        before = time.perf_counter()
        pipe = self._ready(checkpoint, settings)
        loading = time.perf_counter() - before
        job.tell(notes=notes + pipe.prompt_notes(settings.prompt, settings.sampling.negative_prompt))
        job.check()
        job.tell(steps=settings.sampling.steps)
        generate_video(
            pipe, settings, path, self.options, loading, _JobObserver(job, Preview(pipe), settings.sampling.steps)
        )
        return JobResult(path, settings, time.perf_counter() - start)

    def _ready(self, checkpoint: Checkpoint, settings: Settings) -> GuidedPipeline:
        """The pipeline for settings: as it is, with another attention, or loaded anew, as little as will do.

        LoRA is merged into the weights while they are read, so that another one needs them read again; and a plan of
        memory is for videos up to the one that it was made for.
        """
        # All that takes a new load to change; attention can be exchanged in place.
        weights = tuple(value for name, value in vars(settings.model).items() if name != "attention")
        needs, writes = _needs(settings), writers_of([settings])
        unable = any(now > then for now, then in zip(writes, self._writes))
        outgrown = self.options.memory is not None and any(now > then for now, then in zip(needs, self._planned))
        if self._pipe is None or weights != self._weights or outgrown or unable:
            if settings.lora:
                # A file that does not fit should not cost the models that are there.
                kind = checkpoint.family.load_pipeline(checkpoint.layout)
                model = kind.transformer_component(checkpoint, settings.model.transformer_files.get(None)).model
                for file in settings.lora:
                    read_lora(file, model, checkpoint.family.naming)
            self._pipe = None
            # Before the next one is loaded, so that two need not fit at once.
            gc.collect()
            torch.cuda.empty_cache()
            self._pipe = load_pipeline(checkpoint, [settings], self.device, self.options)
            self._weights, self._planned, self._writes = weights, needs, writes
        elif settings.attention != self._pipe.transformer.nabla.config:
            apply_attention(self._pipe.transformers, settings.attention)
        return self._pipe


def _needs(settings: Settings) -> tuple[int, int, bool]:
    """What a video needs memory for, beside weights: tokens, pixels of a frame, whether masks are kept."""
    video = settings.video
    return math.prod(video.token_grid), math.prod(video.size), settings.attention.mask_refresh > 1


class _JobObserver(Observer):
    """Tells a job of each stage and step, and ends it after one if that is wished."""

    def __init__(self, job: Job, preview: Preview, steps: int):
        self.job, self.preview, self.steps = job, preview, steps
        self.pace, self.last_at = Pace(), 0.0

    def stage_begins(self, name: str) -> None:
        self.job.tell(stage={"text": READING, "sampling": SAMPLING, "decode": DECODING}[name])

    def stage_ends(self, name: str, seconds: float) -> None:
        self.job.check()
        if name == "decode":
            self.job.tell(stage=WRITING)

    def step_ends(self, step: int, clean: Tensor) -> None:
        self.job.check()
        now = time.perf_counter()
        # The first step compiles.
        left = None if step == 0 else self.pace.seconds_left(now - self.last_at, self.steps - step - 1)
        self.last_at = now
        picture = self.preview.see(clean)
        news = {} if picture is None else {"preview": picture}
        self.job.tell(step=step + 1, seconds_left=left, **news)
