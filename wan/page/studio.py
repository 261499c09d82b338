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

from nabla import InputError
from wan import parts
from wan.attention import apply_attention
from wan.checkpoint import Checkpoint
from wan.config import Settings
from wan.lora import read_lora
from wan.making import Options, load, make
from wan.observer import Observer
from wan.page.preview import Preview
from wan.pipeline import WanT2V
from wan.processes import pick_device
from wan.progress import Pace
from wan.run import Request, check_output, settle, unexpected
from wan.sampling import Cancelled
from wan.video import make_folder

log = logging.getLogger("wan")

MAX_WAITING = 20
# How often a job that waits is looked at, for its place in the line may change.
LOOK_SECONDS = 0.5

WAITING, LOADING, READING, SAMPLING, DECODING, WRITING = (
    "Waiting",
    "Loading the model",
    "Reading the prompt",
    "Sampling",
    "Decoding",
    "Writing",
)


@dataclass(frozen=True)
class Progress:
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
class Made:
    """A video that is made: its file, whose record lies beside it, and the settings, with the seed that was drawn."""

    path: Path
    settings: Settings
    seconds: float

    @property
    def record(self) -> Path:
        return self.path.with_suffix(".json")


class Job:
    """One video that was asked for."""

    def __init__(self) -> None:
        self.progress = Progress(WAITING)
        self.future: Future[Made] | None = None
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

    def changes(self) -> Iterator[Progress]:
        """Its progress whenever that changed or some time has passed, until it has ended."""
        while not self.future.done():
            yield self.progress
            self._changed.wait(LOOK_SECONDS)
            self._changed.clear()

    def result(self) -> Made:
        """What it came to, once it has ended; raises what went wrong, or `Cancelled`."""
        try:
            return self.future.result()
        except CancelledError:
            raise Cancelled from None


class Studio:
    """Makes videos with one pipeline, one at a time; leave it as a context to end what runs.

    folder: of videos and their records
    """

    def __init__(self, options: Options, folder: Path, default_checkpoint: str):
        make_folder(folder)
        self.options = options
        self.device = pick_device(options.device)
        self.folder = folder
        self.default_checkpoint = default_checkpoint
        self._pipe: WanT2V | None = None
        self._weights: tuple = ()
        # What the pipeline's plan of memory was made for, see `_needs`.
        self._planned = 0, 0, False
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="studio")

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        for job in list(self._jobs):
            job.cancel()
        self._worker.shutdown()

    def submit(self, layer: dict[str, Any]) -> Job:
        """Ask for the video of settings in the schema of the YAML files; raises `InputError` if too many wait."""
        with self._lock:
            if len(self._jobs) > MAX_WAITING:
                raise InputError(f"{MAX_WAITING} videos are waiting already; try again later")
            job = Job()
            self._jobs.append(job)
            job.tell(ahead=len(self._jobs) - 1)
            job.future = self._worker.submit(self._make, layer, job)
        job.future.add_done_callback(lambda _: self._forget(job))
        return job

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._jobs.remove(job)
            for ahead, other in enumerate(self._jobs):
                other.tell(ahead=ahead)

    def _make(self, layer: dict[str, Any], job: Job) -> Made:
        start = time.perf_counter()
        job.tell(stage=LOADING)
        request = Request(layer, config=None, task=None, default_checkpoint=self.default_checkpoint)
        checkpoint, [(settings, name)] = settle(request, self.device)
        settings = replace(settings, sampling=settings.sampling.with_seed())
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
        job.check()
        job.tell(steps=settings.sampling.steps)
        make(pipe, settings, path, self.options, loading, _Teller(job, Preview(pipe), settings.sampling.steps))
        return Made(path, settings, time.perf_counter() - start)

    def _ready(self, checkpoint: Checkpoint, settings: Settings) -> WanT2V:
        """The pipeline for settings: as it is, with another attention, or loaded anew, as little as will do.

        LoRA is merged into the weights while they are read, so that another one needs them read again; and a plan of
        memory is for videos up to the one that it was made for.
        """
        weights = tuple(
            value for name, value in vars(settings).items() if name not in ("prompt", "attention", "sampling", "video")
        )
        needs = _needs(settings)
        outgrown = self.options.memory is not None and any(now > then for now, then in zip(needs, self._planned))
        if self._pipe is None or weights != self._weights or outgrown:
            if settings.lora:
                # A file that does not fit should not cost the models that are there.
                model = parts.transformer_part(checkpoint, settings.transformer).model
                for file in settings.lora:
                    read_lora(file, model)
            self._pipe = None
            gc.collect()
            torch.cuda.empty_cache()
            self._pipe = load(checkpoint, [settings], self.device, self.options)
            self._weights, self._planned = weights, needs
        elif settings.attention != self._pipe.transformer.nabla.config:
            apply_attention(self._pipe.transformer, settings.attention)
        return self._pipe


def _needs(settings: Settings) -> tuple[int, int, bool]:
    """What a video needs memory for, beside weights: tokens, pixels of a frame, whether masks are kept."""
    video = settings.video
    return math.prod(video.token_grid), math.prod(video.size), settings.attention.mask_refresh > 1


class _Teller(Observer):
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
