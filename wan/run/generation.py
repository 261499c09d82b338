"""Videos from settings: load once, then generate, write and report each."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nabla import InputError
from wan.caches.applied import reuse_of
from wan.config.config_files import read_made_with
from wan.config.model_settings import expert_text
from wan.config.settings import Settings, writers_of
from wan.files.formats import GGUF
from wan.files.video import sidecar_of, write_with_sidecar
from wan.memory.estimates import GIB
from wan.memory.options import LoadOptions
from wan.memory.peak import peak_gpu_bytes, peak_host_bytes
from wan.memory.planning import plan_run
from wan.models.checkpoint import Checkpoint
from wan.observe.observer import Observer, Observers
from wan.observe.recorder import Recorder
from wan.observe.report import draw_report
from wan.parallel.distributed import DistributedContext
from wan.run.inputs import open_inputs
from wan.run.remaking import quantized_otherwise
from wan.run.request import Options
from wan.run.sidecars import Video, free_path
from wan.run.versions import installed_versions
from wan.sampling.guided import GuidedPipeline

log = logging.getLogger("wan")

VERSIONS_OF = ("torch", "diffusers", "transformers", "nvidia-cudnn-frontend", "torchao", "peft", "gguf")


class OutOfMemory(InputError):
    """A GPU or the machine has too little memory; the text says what to lower."""


def generate_all(
    checkpoint: Checkpoint,
    videos: list[Video],
    device: torch.device,
    options: Options,
    processes: DistributedContext | None = None,
) -> None:
    """Load the models once, and make videos, each by the processes of a replica.

    Raises `OutOfMemory`, an `InputError` with what to lower, if a GPU or the machine runs out of memory.
    """
    start = time.perf_counter()
    every = [one for one, _ in videos]
    pipe = load_pipeline(checkpoint, every, device, options, processes)
    loading = time.perf_counter() - start
    # A replica takes the next video whenever it is done with one, since videos may differ in size and length.
    for number in range(len(videos)) if processes is None else processes.claim_jobs(len(videos)):
        settings, path = videos[number]
        own = options.of_one(path) if options.named_apart else options
        generate_video(pipe, settings, path, own, loading)


def load_pipeline(
    checkpoint: Checkpoint,
    every: list[Settings],
    device: torch.device,
    options: Options,
    processes: DistributedContext | None = None,
) -> GuidedPipeline:
    """The pipeline that the settings of one or several videos ask for. Raises `InputError` as `generate_all` does."""
    # The first stands for all in what is loaded: videos of a list differ in no setting of models, see `wan.run.jobs`.
    settings, plan = every[0], None
    writes, sees = writers_of(every)
    expands = any(one.expand_prompt for one in every)
    checkpoint.family.require(expand_prompt=expands, **_features(settings, options, processes))
    if options.memory is not None:
        weighed = checkpoint.family.load_memory()(checkpoint, every, options.compile)
        plan = plan_run(weighed, settings, device, options.memory, options.t5_cpu)
    if options.again is not None and (processes is None or processes.rank == 0):
        if line := quantized_otherwise(options.again, read_made_with(options.again), settings, plan):
            log.warning("warning: %s", line)
    how = LoadOptions(
        device,
        options.offload,
        options.t5_cpu,
        options.compile,
        processes,
        dit_fsdp=options.dit_fsdp,
        t5_fsdp=options.t5_fsdp,
        expand_prompt=writes,
        expand_pictures=sees,
        plan=plan,
    )
    with _clear_about_memory(settings, options):
        pipe = checkpoint.family.load_pipeline(checkpoint.layout).from_settings(checkpoint, settings, how)
    place = settings.checkpoint, device, settings.dtype
    decoder = ""
    if pipe.vae is not None:
        decoder = f", decoder in {str(next(pipe.vae.decoder.parameters()).dtype).removeprefix('torch.')}"
    log.info("checkpoint: %s on %s in %s%s", *place, decoder)
    for expert, file in settings.model.transformer_files.items():
        log.info("transformer: %s%s", expert_text(expert), file)
    if pipe.is_leader:
        # Until here only the first process of all speaks; now the leader of each replica does, of its own videos.
        log.setLevel(logging.INFO)
    return pipe


def _features(settings: Settings, options: Options, processes: DistributedContext | None) -> dict[str, object]:
    """What a run asks for of what a family may not support."""
    return {
        "cache": settings.cache,
        "fp8": settings.fp8,
        "gguf": any(file.endswith(GGUF) for file in settings.model.transformer_files.values()),
        "lora": settings.lora,
        "memory": options.memory,
        "dit_fsdp": options.dit_fsdp,
        "t5_fsdp": options.t5_fsdp,
        "ulysses_size": processes is not None and processes.layout.ulysses > 1,
    }


def generate_video(
    pipe: GuidedPipeline,
    settings: Settings,
    path: Path,
    options: Options,
    loading: float,
    observer: Observer | None = None,
) -> None:
    """Make the video that the settings describe and write it to `path`, its sidecar beside it as JSON.

    A path ending in .png takes one frame, any other is written as H.264 mp4. `observer` is told what happens
    besides. Raises `InputError` as `generate_all` does.
    """
    detailed = options.log is not None or options.report is not None
    recorder = Recorder(options.log, True, detailed, options.report is not None, {"loading": loading})
    made = make_frames(
        pipe, settings, options, loading, recorder if observer is None else Observers(recorder, observer)
    )
    # Only the leader of those that share a video has its frames.
    if made is None:
        return
    # Whether the path is free was asked when the run began, which may be hours ago.
    if not options.overwrite and (free := free_path(path)) != path:
        log.warning("warning: another run has made %s meanwhile; this one is %s", path, free)
        path = free
    seconds, made_with = made.seconds, made.made_with
    write_with_sidecar(path, made.frames, settings.video.fps, made.record)
    stages = ", ".join(f"{name} {taken:.1f} s" for name, taken in seconds.items())
    peak = ", ".join(f"{where} {amount}" for where, amount in made_with["peak_memory"].items())
    log.info("time: %s (%.2f s a step); peak memory: %s", stages, seconds["sampling"] / settings.sampling.steps, peak)
    log.info("wrote %s and %s", path, sidecar_of(path))
    if options.log is not None:
        log.info("log: %s", options.log)
    if options.report is not None:
        _draw(recorder, options.report)


class Made(NamedTuple):
    """A video that is made and not written yet.

    frames: (frames, height, width, 3) uint8
    settings: its own, with the text that its prompt was expanded to
    seconds: of each stage; made_with: what its record says beside the settings
    """

    frames: np.ndarray
    settings: Settings
    seconds: dict[str, float]
    made_with: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """What its sidecar says of it."""
        return {"settings": self.settings.to_dict(), "made_with": self.made_with}


def make_frames(
    pipe: GuidedPipeline, settings: Settings, options: Options, loading: float, observer: Observer
) -> Made | None:
    """The video that the settings describe; None on a process that does not lead.

    loading: seconds that the models took. Raises `InputError` as `generate_all` does.
    """
    inputs, record = open_inputs(settings)
    with _clear_about_memory(settings, options):
        settings, expanding = _expanded(pipe, settings, inputs.get("image"))
        frames = _frames(pipe, settings, inputs, observer)
    if frames is None:
        return None
    seconds = {"loading": loading} | expanding | pipe.seconds
    return Made(frames, settings, seconds, _made_with(pipe, options, seconds) | record)


def _expanded(
    pipe: GuidedPipeline, settings: Settings, picture: np.ndarray | None
) -> tuple[Settings, dict[str, float]]:
    """Settings with the text that their prompt is expanded to, if it is, and the seconds that it took to write."""
    seconds = {}
    if settings.writes_prompt:
        start = time.perf_counter()
        settings = replace(settings, expanded_prompt=pipe.expand_prompt(settings.prompt or "", picture))
        seconds["expanding"] = time.perf_counter() - start
    if settings.expanded_prompt is not None:
        log.info("expanded prompt: %s", settings.expanded_prompt)
    return settings, seconds


def _frames(
    pipe: GuidedPipeline, settings: Settings, inputs: Mapping[str, Any], observer: Observer
) -> np.ndarray | None:
    """The video that settings describe, as `generate` of a pipeline gives it, after lines of what it will be."""
    video, sampling = settings.video, settings.sampling
    log.info("attention: %s", pipe.describe_attention(video))
    size = "x".join(map(str, video.size))
    walk = f"{sampling.steps} steps of {sampling.solver}, seed {sampling.seed}"
    log.info("video: %s, %d frames, %s", size, video.frame_num, walk)
    # Both say what not every family knows only where it is not the default.
    made = video.to_dict() | sampling.to_dict()
    # A video's own, not its making's.
    del made["fps"]
    return pipe.generate(settings.text, observer=observer, **made, **inputs)


def _draw(recorder: Recorder, report: Path) -> None:
    """Draw the report, or warn, as where a full disk ends a log: the videos to come are worth more."""
    try:
        draw_report(recorder.records, report, recorder.examples)
        log.info("report: %s", report)
    except InputError as error:
        log.warning("warning: no report: %s", error)


@contextmanager
def _clear_about_memory(settings: Settings, options: Options) -> Iterator[None]:
    try:
        yield
    # A subclass of RuntimeError, so that it has to come first.
    except torch.OutOfMemoryError as error:
        offload = bool(options.offload or options.memory)
        raise OutOfMemory(_out_of_memory("GPU", settings, offload, options.t5_cpu)) from error
    except RuntimeError as error:
        # The host's memory has no error of its own in torch; its message names the allocator.
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise OutOfMemory(_out_of_memory("machine", settings, offload=True, t5_cpu=True)) from error


def _out_of_memory(what: str, settings: Settings, offload: bool, t5_cpu: bool) -> str:
    width, height = settings.video.size
    hints = [f"a smaller --size than {width}*{height}", f"fewer than {settings.video.frame_num} frames (--frame_num)"]
    hints += [] if offload else ["--offload_model true"]
    hints += [] if t5_cpu else ["--t5_cpu"]
    return f"the {what} ran out of memory; try {', '.join(hints[:-1])} or {hints[-1]}"


def _made_with(pipe: GuidedPipeline, options: Options, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What a sidecar says beside the settings: versions, hardware, times and peak memory of this process, and how."""
    device = pipe.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    peak = {"host": f"{peak_host_bytes() / GIB:.1f} GiB"}
    if device.type == "cuda":
        peak["gpu"] = f"{peak_gpu_bytes(device) / GIB:.1f} GiB"
    said: dict[str, Any] = {
        "versions": installed_versions(VERSIONS_OF),
        "device": f"{device.type}, {name}",
        "seconds": {name: round(taken, 3) for name, taken in seconds.items()},
        "peak_memory": peak,
        "offload": pipe.offload,
        "t5_cpu": options.t5_cpu,
        "compile": options.compile,
    }
    if pipe.cache is not None:
        forwards, reused = reuse_of(pipe.transformers)
        log.info("cache: %s, %d of %d forwards reused", pipe.cache.settings.describe(), reused, forwards)
        said["cache"] = {"forwards": forwards, "reused": reused}
    if pipe.plan is not None:
        said |= {"memory": options.memory, "plan": pipe.plan.to_sidecar()}
    if pipe.distributed is not None:
        said["layout"] = asdict(pipe.distributed.layout)
    return said
