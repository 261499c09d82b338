"""One run of generate.py: settle the settings, load, generate, write, report."""

from __future__ import annotations

import logging
import os
import platform
import re
import resource
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nabla import InputError
from wan import memory
from wan.checkpoint import DEFAULTS_FILE, Checkpoint
from wan.config import Settings, read_settings, resolve
from wan.pipeline import WanT2V
from wan.video import check_writable, write_image, write_json, write_video

log = logging.getLogger("wan")

VERSIONS_OF = ("torch", "diffusers", "transformers")


def require_one_process(ulysses_size: int, t5_fsdp: bool, dit_fsdp: bool) -> None:
    """Raise `InputError` for what needs several processes, which this version does not run on."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    asked = {
        f"{world} processes": world > 1,
        f"ulysses_size {ulysses_size}": ulysses_size != 1,
        "t5_fsdp": t5_fsdp,
        "dit_fsdp": dit_fsdp,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise InputError(f"{what}: only one process with one GPU is supported so far; start python generate.py alone")


def settle(flags: Mapping[str, Any], config: str | None, default_checkpoint: str) -> tuple[Checkpoint, Settings]:
    """The checkpoint and the settings of a run: flags over the config file over the checkpoint over the defaults.

    Everything that can be checked without the checkpoint is checked before it is looked for.
    """
    from_file = read_settings(config) if config else {}
    fallback = {"checkpoint": default_checkpoint}
    name = resolve(flags, from_file, fallback).checkpoint
    checkpoint = Checkpoint.open(name)
    settings = resolve(flags, from_file, checkpoint_settings(checkpoint), fallback)
    own, chosen = checkpoint.sparse_algorithm, settings.attention.algorithm
    if own is not None and own != chosen:
        log.warning("warning: checkpoint %s was made for %s; running %s as asked", name, own, chosen)
    if settings.sampling.seed is None:
        settings = replace(settings, sampling=replace(settings.sampling, seed=secrets.randbelow(2**31)))
    return checkpoint, settings


def checkpoint_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings that a checkpoint brings: its own algorithm and what its defaults file says."""
    path = checkpoint.folder / DEFAULTS_FILE
    settings = read_settings(str(path)) if path.is_file() else {}
    if checkpoint.sparse_algorithm is not None:
        settings = {"attention": {"algorithm": checkpoint.sparse_algorithm}} | settings
    return settings


def default_path(prompt: str, suffix: str) -> Path:
    """A file name in the working directory from the prompt's first words and the time."""
    words = re.sub(r"[^\w]+", "-", prompt).strip("-")[:50].rstrip("-")
    return Path(f"{words}_{datetime.now():%Y%m%d-%H%M%S}{suffix}")


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one; raises `InputError` if it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); try --device cpu") from None
    return device


def generate(
    checkpoint: Checkpoint,
    settings: Settings,
    path: Path,
    device: torch.device,
    dtype: str | None = None,
    offload: bool | None = None,
    t5_cpu: bool = False,
) -> None:
    """Make the video that the settings describe and write it to `path`, its settings beside it as JSON.

    A path ending in .png takes one frame, any other is written as H.264 mp4. Raises `InputError` with what to lower
    if the GPU runs out of memory.
    """
    if path.suffix not in (".mp4", ".png") or (path.suffix == ".png" and settings.video.frame_num != 1):
        kind = ".png or .mp4" if settings.video.frame_num == 1 else ".mp4"
        raise InputError(f"save_file {path} must end in {kind} for {settings.video.frame_num} frames")
    check_writable(path)
    checkpoint.require_tokenizer()
    dtype = getattr(torch, dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    try:
        video, seconds = _generate(checkpoint, settings, device, dtype, offload, t5_cpu)
    except torch.OutOfMemoryError as error:
        raise InputError(_out_of_memory(settings, offload, t5_cpu)) from error
    if path.suffix == ".png":
        write_image(path, video[0])
    else:
        write_video(path, video, settings.video.fps)
    made_with = _made_with(device, dtype) | {"seconds": {name: round(s, 3) for name, s in seconds.items()}}
    write_json(path.with_suffix(".json"), {"settings": settings.to_dict(), "made_with": made_with})
    step = seconds["sampling"] / settings.sampling.steps
    stages = ", ".join(f"{name} {taken:.1f} s" for name, taken in seconds.items())
    peak = ", ".join(f"{where} {amount}" for where, amount in made_with["peak_memory"].items())
    log.info("time: %s (%.2f s a step); peak memory: %s", stages, step, peak)
    log.info("wrote %s and %s", path, path.with_suffix(".json"))


def _generate(
    checkpoint: Checkpoint, settings: Settings, device: torch.device, dtype: torch.dtype, offload: bool | None, t5_cpu: bool
) -> tuple[np.ndarray, dict[str, float]]:
    start = time.perf_counter()
    pipe = WanT2V.from_pretrained(checkpoint, settings.attention, device, dtype, offload, t5_cpu)
    loading = time.perf_counter() - start
    video, sampling = settings.video, settings.sampling
    log.info("checkpoint: %s on %s in %s", settings.checkpoint, device, str(dtype).removeprefix("torch."))
    log.info("attention: %s", pipe.describe_attention(video.size, video.frame_num))
    size, frames = "x".join(map(str, video.size)), video.frame_num
    log.info("video: %s, %d frames, %d steps of %s, seed %d", size, frames, sampling.steps, sampling.solver, sampling.seed)
    result = pipe.generate(
        settings.prompt,
        sampling.negative_prompt,
        video.size,
        video.frame_num,
        sampling.seed,
        sampling.steps,
        sampling.shift,
        sampling.guide_scale,
        sampling.solver,
        progress=True,
    )
    return result, {"loading": loading, **pipe.seconds}


def _out_of_memory(settings: Settings, offload: bool | None, t5_cpu: bool) -> str:
    width, height = settings.video.size
    hints = [f"a smaller --size than {width}*{height}", f"fewer than {settings.video.frame_num} frames (--frame_num)"]
    hints += [] if offload else ["--offload_model true"]
    hints += [] if t5_cpu else ["--t5_cpu"]
    return f"the GPU ran out of memory; try {', '.join(hints[:-1])} or {hints[-1]}"


def _made_with(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, hardware and peak memory of this process."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = {"host": f"{host / memory.GIB:.1f} GiB"}
    if device.type == "cuda":
        peak["gpu"] = f"{torch.cuda.max_memory_allocated(device) / memory.GIB:.1f} GiB"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {package: version(package) for package in VERSIONS_OF}
    return {"versions": versions, "device": name, "dtype": str(dtype).removeprefix("torch."), "peak_memory": peak}
