"""Events of a generation: for a log while it runs, for a line of progress, and for a report afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from wan.observe import events
from wan.observe.events import Event
from wan.observe.observer import ObservedPipeline, Observer, Observers
from wan.observe.profiler import Profiler
from wan.observe.progress import ProgressLine
from wan.observe.run_log import RunLog
from wan.observe.step_trace import MaskExample, StepTrace

if TYPE_CHECKING:
    from wan.config.settings import SamplingSettings, VideoSettings


class Recorder(Observer):
    """Keeps the events of the last video in `records`: one of kind "run", then for each step one of kind "layer" for
    each layer and one of kind "step", and one of kind "stages" at the end. Their fields are explained in the first.

    log: a file to write them to as they are made, a JSON object a line
    progress: show a line of progress
    timed: whether to time the transformer's blocks and what is in them
    examples: keep masks of the last step that computed all layers, for `wan.observe.report`
    seconds: of stages that came before, such as loading
    Of processes that share a video, the one that leads writes and times, and the first of all shows the progress.
    """

    def __init__(
        self,
        log: str | Path | None = None,
        progress: bool = False,
        timed: bool = True,
        examples: bool = False,
        seconds: Mapping[str, float] | None = None,
    ):
        self.log = None if log is None else Path(log)
        self.shows, self.timed, self.keeps_examples = progress, timed, examples
        self.earlier = dict(seconds or {})
        self.records: list[Event] = []
        self.examples: list[MaskExample] = []
        self.waiting: list[StepTrace] = []
        self.about: Event = {}
        self.progress: ProgressLine | None = None
        self.writer: RunLog | None = None

    @contextmanager
    def video(
        self, pipe: ObservedPipeline, prompt: str, video: VideoSettings, sampling: SamplingSettings
    ) -> Iterator[None]:
        self.about = {"prompt": prompt, "size": list(video.size), "frame_num": video.frame_num, "seed": sampling.seed}
        self.seconds = dict(self.earlier)
        with self._line(pipe, sampling.steps):
            yield
            self._add([events.stages_event(self.seconds, self.records)])
        self.about = {}

    def stage_begins(self, name: str) -> None:
        if self.progress:
            self.progress.stage(name)

    def stage_ends(self, name: str, seconds: float) -> None:
        self.seconds[name] = seconds

    @contextmanager
    def sampling(self, pipe: ObservedPipeline, sampling: SamplingSettings, latents: Tensor) -> Iterator[None]:
        self.records, self.examples, self.waiting = [], [], []
        self.writer = RunLog(self.log) if self.log is not None and pipe.is_leader else None
        self.times = self.timed and pipe.is_leader
        # What a GPU has done is read back when the next step has been asked for, so that it never runs out of work.
        self.lag = int(pipe.device.type == "cuda")
        self._add([events.run_event(pipe, sampling, latents, self.about)])
        # With a cache it is not known beforehand which step is the last that computes all layers.
        looked_at = range(0 if pipe.cache else sampling.steps - 1, sampling.steps)
        examples = looked_at if self.keeps_examples and pipe.is_leader else ()
        watched = pipe.transformers, pipe.transformer_spec
        profiler = Profiler(*watched, pipe.device, pipe.distributed, self.times, examples)
        with self._line(pipe, sampling.steps, "sampling"), profiler as self.profiler:
            yield
            self._settle(0)

    def step_begins(self, step: int) -> None:
        self.profiler.begin_step(step)

    def step_ends(self, step: int, clean: Tensor) -> None:
        self.waiting.append(self.profiler.end_step())
        self._settle(self.lag)

    @contextmanager
    def _line(self, pipe: ObservedPipeline, steps: int, stage: str | None = None) -> Iterator[None]:
        """A line of progress, that begins in a stage, unless there is one or this process shows none."""
        if self.progress or not self.shows or (pipe.distributed is not None and pipe.distributed.rank > 0):
            yield
            return
        self.progress = ProgressLine(steps)
        if stage is not None:
            self.progress.stage(stage)
        try:
            yield
        finally:
            self.progress.close()
            self.progress = None

    def _settle(self, lag: int) -> None:
        """Make events of all steps but the last `lag`, waiting until the device is done with them."""
        while len(self.waiting) > lag:
            trace = self.waiting.pop(0)
            trace.wait()
            self._add(events.step_events(trace, self.times))
            found = events.mask_examples(trace)
            # A step of which a cache left out layers shows fewer, and does not take the place of a whole one.
            if {one.layer for one in found} >= {one.layer for one in self.examples}:
                self.examples = found
            if self.progress:
                step = self.records[-1]
                # Of a step that a cache cut short the share would be that of some layers; the line keeps the last of
                # all layers.
                kept = step["kept"] if step["layers_run"] == len(trace.kernels) else None
                self.progress.step(step["ms"] / 1000, kept)

    def _add(self, made: list[Event]) -> None:
        self.records += made
        if self.writer:
            self.writer.write(made)


def with_progress(progress: bool, observer: Observer | None) -> Observer:
    """An observer, or one that does nothing, beside a line of progress if that is wished."""
    if not progress:
        return observer or Observer()
    shown = Recorder(progress=True, timed=False)
    return shown if observer is None else Observers(shown, observer)
