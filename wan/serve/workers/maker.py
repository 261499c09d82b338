"""Videos made one after another by one pipeline, in the process that holds it."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError
from wan.files.atomic import scratch
from wan.files.video import sidecar_of, write_with_sidecar
from wan.memory.peak import peak_gpu_bytes
from wan.observe.observer import Observer, Observers
from wan.observe.progress import Pace
from wan.observe.recorder import Recorder
from wan.parallel.distributed import DistributedContext, has_lost_another, pick_device
from wan.run.advice import unexpected
from wan.run.generation import Made as MadeFrames
from wan.run.generation import OutOfMemory, load_pipeline, make_frames
from wan.run.outputs import ending
from wan.run.request import Options, Request
from wan.run.settle import settle
from wan.sampling.loop import Cancelled
from wan.serve.jobs.store import StorageError
from wan.serve.shown import without_folders
from wan.serve.workers.loaded import Loaded, LoadPipeline
from wan.serve.workers.messages import (
    DECODING,
    LOADING,
    READING,
    SAMPLING,
    WRITING,
    Aborted,
    Failed,
    InputFile,
    Made,
    Order,
    Progress,
)
from wan.serve.workers.pictures import jpeg, sprite_sheet, thumbnail
from wan.serve.workers.preview import Preview

log = logging.getLogger("wan")

MAX_MESSAGE = 500
STAGES = {"text": READING, "sampling": SAMPLING, "decode": DECODING}

Tell = Callable[[Progress], None]


class Maker:
    """Makes what is ordered, one video at a time; several processes that share each have one each, and the same orders.

    default_checkpoint: of orders that name none
    load: how a pipeline is loaded, as by `wan.run.generation.load_pipeline`
    processes: those that share each video, or None for this one alone
    Raises `InputError` for a device that cannot be used.
    """

    def __init__(
        self,
        options: Options,
        default_checkpoint: str,
        load: LoadPipeline = load_pipeline,
        processes: DistributedContext | None = None,
    ):
        self.device = pick_device(options.device) if processes is None else processes.device
        self.options = options
        self.default_checkpoint = default_checkpoint
        self.loaded = Loaded(options, self.device, load, processes)

    def make(self, order: Order, tell: Tell, is_aborted: Callable[[], bool]) -> Made | Failed | Aborted | None:
        """What an order came to; None on a process that shares a video and does not lead.

        tell: is told how far it is
        is_aborted: whether nobody wants it any more; all processes that share a video ask that at the same moments, the
            end of each step among them, and must get one answer
        """
        try:
            # Where the next process cleans up after one that was killed.
            with scratch(Path(tempfile.gettempdir())) as folder:
                return self._make(order, folder, tell, is_aborted)
        except Cancelled:
            log.info("ended: %s, which nobody wants any more", order.job_id)
            return Aborted()
        except Exception as error:
            if self.loaded.processes is not None and has_lost_another(error):
                # Whoever started the processes knows which has gone, and why; this one is of no use without it.
                raise
            failed = self._failed(error)
        # Only here is the error gone, whose frames hold what filled the memory.
        gc.collect()
        if self.device.type == "cuda" and not failed.broken:
            torch.cuda.empty_cache()
        return failed

    def _make(self, order: Order, folder: Path, tell: Tell, is_aborted: Callable[[], bool]) -> Made | None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        observer = _Teller(tell, is_aborted, self.device)
        log.info("job: %s", order.job_id)
        observer.say(stage=LOADING)
        layer = dict(order.layer) | _placed(order.inputs, folder)
        checkpoint, [(settings, _)] = settle(Request(layer, None, None, self.default_checkpoint), self.device)
        notes = tuple(unexpected(checkpoint, settings))
        observer.say(steps=settings.sampling.steps, notes=_shown(notes))
        observer.check()
        start = time.perf_counter()
        pipe = self.loaded.ready(checkpoint, settings)
        loading = time.perf_counter() - start
        notes += pipe.prompt_notes(settings.prompt, settings.sampling.negative_prompt)
        for line in notes:
            log.warning("warning: %s", line)
        observer.say(notes=_shown(notes))
        observer.check()
        # Only the process that leads can decode.
        observer.preview = Preview(pipe) if pipe.is_leader else None
        recorder = Recorder(timed=False, seconds={"loading": loading})
        frames = make_frames(pipe, settings, self.options, loading, Observers(recorder, observer))
        if frames is None:
            return None
        observer.say(stage=WRITING)
        made = self._written(frames, order.inputs, folder, None if settings.attention.is_dense else recorder)
        log.info("made: %s", ", ".join(f"{name} {taken:.1f} s" for name, taken in made.seconds.items()))
        return made

    def _written(
        self, made: MadeFrames, inputs: Mapping[str, InputFile], folder: Path, recorder: Recorder | None
    ) -> Made:
        """A video's files, read back from where our own writers put them, and what there is to be said of it."""
        start, path = time.perf_counter(), folder / f"video{ending(made.settings)}"
        # What a client sent is known by its name; where it lay for this video is gone with it.
        settings = made.settings.to_dict() | {name: file.name for name, file in inputs.items()}
        try:
            write_with_sidecar(path, made.frames, made.settings.video.fps, made.record | {"settings": settings})
        except InputError as error:
            # Of a path that no client has chosen.
            raise StorageError(f"the server cannot write the video: {error}") from error
        files = {file.name: file.read_bytes() for file in (path, sidecar_of(path))}
        files |= {"thumbnail.webp": thumbnail(made.frames), "spritesheet.webp": sprite_sheet(made.frames)}
        return Made(
            files,
            settings,
            {**made.seconds, WRITING: time.perf_counter() - start},
            peak_gpu_bytes(self.device) if self.device.type == "cuda" else None,
            None if recorder is None else recorder.records[-1]["kept"],
        )

    def _failed(self, error: Exception) -> Failed:
        """What a client is told of an error; those that are bugs of ours leave their traceback on stderr."""
        if isinstance(error, (OutOfMemory, torch.OutOfMemoryError, MemoryError)):
            text = str(error) if isinstance(error, OutOfMemory) else "there is too little memory; make it smaller"
            return Failed("out_of_memory", _line(text))
        if isinstance(error, InputError):
            # A checkpoint that is damaged, or cannot be had, is the operator's to mend.
            code = "internal_error" if isinstance(error, CheckpointError) else "invalid_request"
            return Failed(code, _line(str(error)))
        if isinstance(error, StorageError):
            return Failed("internal_error", _line(str(error)))
        traceback.print_exception(error)
        return Failed("internal_error", _line(f"{type(error).__name__}: {error}"), is_broken(self.device))


def is_broken(device: torch.device) -> bool:
    """Whether a device does nothing more for this process, as a GPU after an error of CUDA."""
    try:
        torch.zeros(1, device=device).item()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


def _placed(inputs: Mapping[str, InputFile], folder: Path) -> dict[str, str]:
    """The settings that name files which a client sent, once they lie in a folder."""
    layer = {}
    for setting, file in inputs.items():
        # Two may have one name.
        path = folder / setting / Path(file.name).name
        path.parent.mkdir()
        path.write_bytes(file.content)
        layer[setting] = str(path)
    return layer


def _shown(notes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(without_folders, notes))


def _line(text: str) -> str:
    """One line, which names no folder."""
    return without_folders(" ".join(text.split()))[:MAX_MESSAGE]


class _Teller(Observer):
    """Tells of each stage and step, and ends the video at one if nobody wants it."""

    def __init__(self, tell: Tell, is_aborted: Callable[[], bool], device: torch.device):
        self.tell, self.is_aborted, self.device = tell, is_aborted, device
        self.progress = Progress(LOADING)
        self.preview: Preview | None = None
        self.pace, self.last_at = Pace(), 0.0

    def say(self, **news: Any) -> None:
        # A preview is told once.
        self.progress = replace(self.progress, **({"preview": None} | news))
        self.tell(self.progress)

    def check(self) -> None:
        if self.is_aborted():
            raise Cancelled

    def stage_begins(self, name: str) -> None:
        self.say(stage=STAGES[name])

    def stage_ends(self, name: str, seconds: float) -> None:
        # Only the process that leads decodes, and what is asked has to be asked by all.
        if name != "decode":
            self.check()

    def step_ends(self, step: int, clean: Tensor) -> None:
        if self.device.type == "cuda":
            # Python is far ahead of a GPU: else the step that is told would not be done, nor the process free.
            torch.cuda.synchronize(self.device)
        self.check()
        now, to_come = time.perf_counter(), self.progress.steps - step - 1
        # The first step compiles.
        left = None if step == 0 else self.pace.seconds_left(now - self.last_at, to_come)
        self.last_at = now
        # After the last step comes the video itself.
        frame = self.preview.see(clean) if self.preview is not None and to_come else None
        self.say(step=step + 1, seconds_left=left, preview=None if frame is None else jpeg(frame))
