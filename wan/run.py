"""One run of generate.py: settle the settings, load, generate, write, report."""

from __future__ import annotations

import logging
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nabla import InputError
from wan import memory
from wan.checkpoint import Checkpoint
from wan.config import Settings, read_settings, resolve
from wan.fast_vae import decoder_dtype
from wan.fp8 import check_fp8
from wan.pipeline import WanT2V
from wan.video import check_writable, write_image, write_json, write_video
from wan.weights import CheckpointError

log = logging.getLogger("wan")

VERSIONS_OF = ("torch", "diffusers", "transformers", "nvidia-cudnn-frontend", "torchao")


def require_one_process(ulysses_size: int, t5_fsdp: bool, dit_fsdp: bool) -> None:
    """Raise `InputError` for what needs several processes, which this version does not run on."""
    world = os.environ.get("WORLD_SIZE", "1")
    asked = {
        f"{world} processes": world != "1",
        f"ulysses_size {ulysses_size}": ulysses_size != 1,
        "t5_fsdp": t5_fsdp,
        "dit_fsdp": dit_fsdp,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise InputError(
                f"{what}: only one process with one GPU is supported so far; start python generate.py alone"
            )


def run(
    flags: Mapping[str, Any],
    config: str | None,
    task: str | None,
    default_checkpoint: str,
    save_file: Path | None,
    device: str | None,
    offload: bool | None,
    t5_cpu: bool,
    compile: bool | None,
) -> None:
    """Make one video: flags over the config file over the checkpoint over the program's defaults.

    Everything that can be checked without the checkpoint is checked before it is looked for.
    """
    from_file = {} if config is None else read_settings(config)
    if "checkpoint" not in flags:
        _check_task(task, config, from_file.get("checkpoint"))
    settings = resolve(flags, from_file, {"checkpoint": default_checkpoint})
    if save_file is not None:
        check_output(save_file)
    device = pick_device(device)
    own_dtype = "float32" if device.type == "cpu" else "bfloat16"
    if settings.fp8:
        check_fp8(device, getattr(torch, settings.dtype or own_dtype))
    checkpoint = Checkpoint.open(settings.checkpoint)
    checkpoint.require_tokenizer()
    settings = checkpoint.resolve(flags, from_file)
    settings = replace(settings, dtype=settings.dtype or own_dtype, sampling=settings.sampling.with_seed())
    _warn_of_the_unexpected(checkpoint, settings)
    path = save_file or default_path(settings)
    check_output(path, settings)
    generate(checkpoint, settings, path, device, offload, t5_cpu, compile)


def _check_task(task: str | None, config: str | None, named: object) -> None:
    """Raise `InputError` if a task asks for a model of another size than the hub id that a config names."""
    size = (task or "").rpartition("-")[2]
    if isinstance(named, str) and not Path(named).is_dir() and size not in named:
        raise InputError(f"task {task}: config {config} names {named}; leave --task out, or choose with --ckpt_dir")


def _warn_of_the_unexpected(checkpoint: Checkpoint, settings: Settings) -> None:
    chosen = settings.attention
    try:
        own = checkpoint.own_attention()
    except CheckpointError as error:
        log.warning("warning: %s; running %s as asked", error, chosen.algorithm)
        own = None
    if own is not None and own.algorithm != chosen.algorithm:
        line = "warning: checkpoint %s was made for %s; running %s as asked"
        log.warning(line, checkpoint.name, own.algorithm, chosen.algorithm)
    if not chosen.is_dense and chosen.dense_steps >= settings.sampling.steps:
        line = "warning: the first %d steps run dense, so all %d steps do; lower dense_steps in a config"
        log.warning(line, chosen.dense_steps, settings.sampling.steps)


def default_path(settings: Settings) -> Path:
    """A file name in the working directory from the prompt's first words and the time."""
    words = re.sub(r"\W+", "-", settings.prompt).strip("-")[:40].rstrip("-")
    suffix = ".png" if settings.video.frame_num == 1 else ".mp4"
    return Path(f"{words or 'video'}_{datetime.now():%Y%m%d-%H%M%S}{suffix}")


def check_output(path: Path, settings: Settings | None = None) -> None:
    """Raise `InputError` unless a video and its settings can be written to `path`, as far as can be told beforehand."""
    many = settings is not None and settings.video.frame_num > 1
    if path.suffix not in (".mp4", ".png") or (path.suffix == ".png" and many):
        kind = f".mp4 for {settings.video.frame_num} frames" if many else ".mp4, or in .png for one frame"
        raise InputError(f"save_file {path} must end in {kind}")
    record = path.with_suffix(".json")
    check_writable(path)
    check_writable(record)
    if record.exists():
        try:
            read_settings(record)
        except InputError:
            raise InputError(f"{record} exists and is not the record of a video; choose another --save_file") from None


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one; raises `InputError` if it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # an unknown, an absent, the meta device
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); try --device cpu") from None
    return device


def generate(
    checkpoint: Checkpoint,
    settings: Settings,
    path: Path,
    device: torch.device,
    offload: bool | None = None,
    t5_cpu: bool = False,
    compile: bool | None = None,
) -> None:
    """Make the video that the settings describe and write it to `path`, its record beside it as JSON.

    A path ending in .png takes one frame, any other is written as H.264 mp4. Raises `InputError` with what to lower
    if the GPU runs out of memory.
    """
    start = time.perf_counter()
    video, sampling = settings.video, settings.sampling
    try:
        pipe = WanT2V.from_pretrained(
            checkpoint,
            settings.attention,
            device,
            getattr(torch, settings.dtype),
            offload,
            t5_cpu,
            compile,
            settings.fp8,
            settings.vae_dtype and getattr(torch, settings.vae_dtype),
        )
        seconds = {"loading": time.perf_counter() - start}
        vae_dtype = str(decoder_dtype(pipe.vae)).removeprefix("torch.")
        place = settings.checkpoint, device, settings.dtype, vae_dtype
        log.info("checkpoint: %s on %s in %s, decoder in %s", *place)
        log.info("attention: %s", pipe.describe_attention(video))
        size = "x".join(map(str, video.size))
        walk = f"{sampling.steps} steps of {sampling.solver}, seed {sampling.seed}"
        log.info("video: %s, %d frames, %s", size, video.frame_num, walk)
        frames = pipe.generate(
            settings.prompt, size=video.size, frame_num=video.frame_num, progress=True, **asdict(sampling)
        )
    except torch.OutOfMemoryError as error:
        raise InputError(_out_of_memory("GPU", settings, offload, t5_cpu)) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise InputError(_out_of_memory("machine", settings, offload=True, t5_cpu=True)) from error
    seconds |= pipe.seconds
    made_with = _made_with(device, seconds) | {"offload": pipe.offload, "t5_cpu": t5_cpu, "compile": compile}
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
