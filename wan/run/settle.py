"""From a request to a checkpoint and the settings and path of each video."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError
from wan.checkpoints.tensor_files import weight_file
from wan.config.config_files import read_settings
from wan.config.model_settings import ModelSettings
from wan.config.settings import Settings, resolve
from wan.files.formats import SAFETENSORS
from wan.models.checkpoint import Checkpoint
from wan.models.recognise import family_of_file
from wan.quantize.quantizer import check_quantization
from wan.run.inputs import check_inputs, fit_to_inputs, other_files
from wan.run.jobs import names_of, read_prompts
from wan.run.outputs import check_output, ending
from wan.run.request import Request
from wan.run.sidecars import Video
from wan.run.tasks import TASKS, kind_on_hub

log = logging.getLogger("wan")


def settle(request: Request, device: torch.device) -> tuple[Checkpoint, list[Video]]:
    """The checkpoint of a request, and the settings and path of each of its videos.

    Everything that can be checked without the checkpoint is checked before it is looked for.
    """
    flags, config = request.flags, request.config
    from_file = {} if config is None else read_settings(config)
    if request.task is not None:
        _check_task(request.task, config, from_file, named="checkpoint" in flags)
    jobs: list[tuple[dict[str, Any], str | None]] = [({}, None)]
    if request.prompt_file is not None:
        jobs = read_prompts(request.prompt_file)
    # A first look, without the layers that the checkpoint itself will add: its name, and what is wrong in those above.
    settings = resolve(jobs[0][0], flags, from_file, {"checkpoint": request.default_checkpoint})
    if request.save_file is not None:
        check_output(request.save_file)
    check_inputs(settings, [layer for layer, _ in jobs])
    for line in [] if config is None else other_files(config, settings):
        log.warning("warning: %s", line)
    own_dtype = "float32" if device.type == "cpu" else "bfloat16"
    _check_weights(settings.model, device, getattr(torch, settings.dtype or own_dtype))
    # A default that is a hub id is downloaded; the small one is a folder beside the source.
    if settings.checkpoint == request.default_checkpoint and Path(settings.checkpoint).is_absolute():
        check_small(Path(settings.checkpoint))
    checkpoint = Checkpoint.open(settings.checkpoint, settings.transformer, settings.model.components)
    # Before what others have is downloaded.
    checkpoint.check_kind(settings.model.kind)
    # Settings that name a checkpoint which is replaced are for its kind too, as the numbers of a text-to-video model
    # are none for one that begins with a picture.
    checkpoint.check_kind(kind_on_hub(str(from_file.get("checkpoint"))))
    _check_task_of(checkpoint, request.task)
    checkpoint.require_companions()
    checkpoint.require_tokenizer()
    every = []
    for layer, _ in jobs:
        # A line of a file of prompts ranks above the flags, which are for all lines.
        settings = checkpoint.resolve(layer, flags, from_file)
        with _named(request.prompt_file, settings.prompt):
            settings = fit_to_inputs(checkpoint, settings)
        if settings.dtype is None:
            settings = replace(settings, model=replace(settings.model, dtype=own_dtype))
        settings.video.check_positions(checkpoint.positions)
        # Of one video the seed is part of what its name stands for; of a list a second run should find those made.
        every.append(settings if request.prompt_file else settings.with_seed())
    return checkpoint, list(zip(every, _paths(request, [name for _, name in jobs], every)))


@contextmanager
def _named(prompt_file: Path | None, prompt: str | None) -> Iterator[None]:
    """Put the file of prompts and the prompt before an error, where there is such a file."""
    try:
        yield
    except InputError as error:
        if prompt_file is None:
            raise
        raise type(error)(f"{prompt_file}, {prompt!r}: {error}") from None


def _check_weights(model: ModelSettings, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `InputError` for weights beside the checkpoint's that are not here, or cannot be on a device."""
    if model.fp8:
        check_quantization("fp8", device, dtype)
    for file in model.transformer_files.values():
        family_of_file(file)
    for lora in model.lora:
        weight_file("lora", lora.file, (SAFETENSORS,))


def _paths(request: Request, given: list[str | None], every: list[Settings]) -> list[Path]:
    """Where each video goes; given: names of those that have one of their own."""
    folder = request.save_dir or Path()
    names = (name or own for name, own in zip(given, names_of(every)))
    paths = [request.save_file or folder / f"{name}{ending(one)}" for name, one in zip(names, every)]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise InputError(f"two prompts would both be {twice[0]}; name one otherwise")
    return paths


def check_small(folder: Path) -> None:
    """Raise `InputError` if the small checkpoint, which runs where nothing names one, is not here."""
    if not folder.is_dir():
        raise InputError(
            f"no checkpoint is named, and the small one, {folder}, comes with the program's source but not with an "
            "installed package; give --ckpt_dir, or --config nabla_0.7.yaml for Wan2.1 14B"
        )


def _check_task(task: str, config: str | None, from_file: Mapping[str, Any], named: bool) -> None:
    """Raise `InputError` if a task asks for another model than a config is for, or names by a hub id.

    named: whether a flag names the checkpoint, so that it does not matter which the config names
    """
    kind, hub = from_file.get("kind"), from_file.get("checkpoint")
    if kind is not None and kind != TASKS[task].kind:
        raise InputError(f"task {task}: config {config} is for {kind}; leave --task out, or give another --config")
    # The name of a folder says nothing.
    if named or not isinstance(hub, str) or os.path.isdir(hub):
        return
    if kind_on_hub(hub) not in (None, TASKS[task].kind) or task.rpartition("-")[2] not in hub:
        raise InputError(f"task {task}: config {config} names {hub}; leave --task out, or choose with --ckpt_dir")


def _check_task_of(checkpoint: Checkpoint, task: str | None) -> None:
    """Raise `CheckpointError` if a task is for another kind of checkpoint than this can be."""
    possible = checkpoint.family.kinds_of(checkpoint.layout)
    if task is not None and TASKS[task].kind not in possible:
        what = " or ".join(sorted(possible)) or checkpoint.family.name
        raise CheckpointError(
            f"task {task}: checkpoint {checkpoint.name} is {what}; leave --task out, or choose with --ckpt_dir"
        )
