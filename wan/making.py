"""Videos from settings: load once, then generate, write and report each."""

from __future__ import annotations

import logging
import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nabla import InputError
from wan import memory
from wan.checkpoint import Checkpoint
from wan.config import Settings
from wan.fast_vae import decoder_dtype
from wan.pipeline import WanT2V
from wan.processes import Processes
from wan.sampling import OnStep
from wan.video import write_image, write_json, write_video

log = logging.getLogger("wan")

Video = tuple[Settings, Path]
VERSIONS_OF = ("torch", "diffusers", "transformers", "nvidia-cudnn-frontend", "torchao", "peft", "gguf")


@dataclass(frozen=True)
class Options:
    """How to run, which does not change the video; see generate.py's flags. None: by default."""

    device: str | None = None
    offload: bool | None = None
    t5_cpu: bool = False
    compile: bool | None = None
    replicas: int | None = None
    cfg_size: int | None = None
    ulysses_size: int | None = None
    dit_fsdp: bool = False
    t5_fsdp: bool = False


def make_all(
    checkpoint: Checkpoint,
    videos: list[Video],
    device: torch.device,
    options: Options,
    processes: Processes | None = None,
) -> None:
    """Load the models once, and make videos, each by the processes of a replica.

    Raises `InputError` with what to lower if a GPU or the machine runs out of memory.
    """
    start = time.perf_counter()
    pipe = load(checkpoint, videos[0][0], device, options, processes)
    loading = time.perf_counter() - start
    for number in range(len(videos)) if processes is None else processes.take_jobs(len(videos)):
        settings, path = videos[number]
        make(pipe, settings, path, options, loading)


def load(
    checkpoint: Checkpoint,
    settings: Settings,
    device: torch.device,
    options: Options,
    processes: Processes | None = None,
) -> WanT2V:
    """The pipeline that settings ask for. Raises `InputError` as `make_all` does."""
    with _clear_about_memory(settings, options):
        pipe = WanT2V.from_pretrained(
            checkpoint,
            settings.attention,
            device,
            getattr(torch, settings.dtype),
            offload=options.offload,
            t5_cpu=options.t5_cpu,
            compile=options.compile,
            fp8=settings.fp8,
            vae_dtype=settings.vae_dtype and getattr(torch, settings.vae_dtype),
            processes=processes,
            dit_fsdp=options.dit_fsdp,
            t5_fsdp=options.t5_fsdp,
            transformer=settings.transformer,
            lora=settings.lora,
        )
    place = settings.checkpoint, device, settings.dtype
    decoder = f", decoder in {str(decoder_dtype(pipe.vae)).removeprefix('torch.')}" if pipe.vae is not None else ""
    log.info("checkpoint: %s on %s in %s%s", *place, decoder)
    if settings.transformer is not None:
        log.info("transformer: %s", settings.transformer)
    if pipe.leads:
        log.setLevel(logging.INFO)
    return pipe


def make(
    pipe: WanT2V,
    settings: Settings,
    path: Path,
    options: Options,
    loading: float,
    on_step: OnStep | None = None,
) -> None:
    """Make the video that the settings describe and write it to `path`, its record beside it as JSON.

    A path ending in .png takes one frame, any other is written as H.264 mp4. For `on_step` see `WanT2V.sample`.
    Raises `InputError` as `make_all` does.
    """
    video, sampling = settings.video, settings.sampling
    with _clear_about_memory(settings, options):
        log.info("attention: %s", pipe.describe_attention(video))
        size = "x".join(map(str, video.size))
        walk = f"{sampling.steps} steps of {sampling.solver}, seed {sampling.seed}"
        log.info("video: %s, %d frames, %s", size, video.frame_num, walk)
        shown = pipe.processes is None or pipe.processes.rank == 0
        frames = pipe.generate(
            settings.prompt,
            size=video.size,
            frame_num=video.frame_num,
            progress=shown,
            on_step=on_step,
            **asdict(sampling),
        )
    if frames is None:
        return
    seconds = {"loading": loading} | pipe.seconds
    made_with = _made_with(pipe.device, seconds)
    made_with |= {"offload": pipe.offload, "t5_cpu": options.t5_cpu, "compile": options.compile}
    if pipe.processes is not None:
        made_with["layout"] = asdict(pipe.processes.layout)
    # A record beside a video says that it is whole and made so.
    path.with_suffix(".json").unlink(missing_ok=True)
    record = {"settings": settings.to_dict(), "made_with": made_with}
    if path.suffix == ".png":
        write_image(path, frames[0])
    else:
        write_video(path, frames, video.fps)
    write_json(path.with_suffix(".json"), record)
    stages = ", ".join(f"{name} {taken:.1f} s" for name, taken in seconds.items())
    peak = ", ".join(f"{where} {amount}" for where, amount in made_with["peak_memory"].items())
    log.info("time: %s (%.2f s a step); peak memory: %s", stages, seconds["sampling"] / sampling.steps, peak)
    log.info("wrote %s and %s", path, path.with_suffix(".json"))


@contextmanager
def _clear_about_memory(settings: Settings, options: Options) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(_out_of_memory("GPU", settings, options.offload, options.t5_cpu)) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise InputError(_out_of_memory("machine", settings, offload=True, t5_cpu=True)) from error


def _out_of_memory(what: str, settings: Settings, offload: bool | None, t5_cpu: bool) -> str:
    width, height = settings.video.size
    hints = [f"a smaller --size than {width}*{height}", f"fewer than {settings.video.frame_num} frames (--frame_num)"]
    hints += [] if offload else ["--offload_model true"]
    hints += [] if t5_cpu else ["--t5_cpu"]
    return f"the {what} ran out of memory; try {', '.join(hints[:-1])} or {hints[-1]}"


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _made_with(device: torch.device, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Versions, hardware, times and peak memory of this process."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    peak = {"host": f"{host / memory.GIB:.1f} GiB"}
    if device.type == "cuda":
        peak["gpu"] = f"{torch.cuda.max_memory_allocated(device) / memory.GIB:.1f} GiB"
    return {
        "versions": installed_versions(VERSIONS_OF),
        "device": f"{device.type}, {name}",
        "seconds": {name: round(taken, 3) for name, taken in seconds.items()},
        "peak_memory": peak,
    }
