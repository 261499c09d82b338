"""One run of generate.py: settle what to make, and lay out the processes that make it."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nabla import InputError
from nabla.config import is_count
from wan.attention.compile import check_compiler
from wan.checkpoints.file_errors import CheckpointError
from wan.checkpoints.tensor_files import weight_file
from wan.config.settings import DEFAULT_NEGATIVE_PROMPT, Settings, read_settings, resolve
from wan.files.formats import SAFETENSORS
from wan.files.json_files import to_json
from wan.files.video import check_encoder, check_writable, make_folder, sidecar_of
from wan.memory.budget import check_memory
from wan.models.checkpoint import Checkpoint, check_transformer_file
from wan.observe.report import check_report
from wan.observe.run_log import check_log
from wan.parallel.distributed import DistributedContext, pick_device, started_by_torchrun
from wan.parallel.layout import choose_layout
from wan.quantize.quantizer import check_quantization
from wan.run.jobs import names_of, read_prompts
from wan.run.making import Options, make_all, named_after
from wan.run.ratios import measured_otherwise
from wan.run.sidecars import Video, check_free, is_made, still_to_make

log = logging.getLogger("wan")

# Weights that are not distilled for it give no picture in so few steps without guidance.
FEW_STEPS = 12
NO_GUIDANCE = "has no effect without guidance (guide_scale 1); raise --sample_guide_scale, or leave it out"


@dataclass(frozen=True)
class Request:
    """What to make.

    flags: settings from the command line, in the schema of the YAML files, which rank above the file `config`
    task: of Wan2.1, whose size the checkpoint that `config` names must have
    default_checkpoint: if nothing names one, and a line to log then
    save_file: of the one video; or prompt_file: a video a line, in folder save_dir
    """

    flags: Mapping[str, Any]
    config: str | None
    task: str | None
    default_checkpoint: str
    about_default: str | None = None
    save_file: Path | None = None
    prompt_file: Path | None = None
    save_dir: Path | None = None


def run(request: Request, options: Options) -> None:
    """Make the video or videos of a request. Under torchrun all its processes come here, and work together."""
    if started_by_torchrun():
        with DistributedContext.join(options.device) as processes:
            log.setLevel(logging.INFO if processes.rank == 0 else logging.WARNING)
            _run(request, options, processes.device, processes)
        return
    for name in ("replicas", "cfg_size", "ulysses_size"):
        asked = getattr(options, name)
        if asked is not None and (not is_count(asked) or asked == 0):
            raise InputError(f"{name} {asked!r} is not a positive integer; leave it out to have it chosen")
        if asked not in (None, 1):
            raise InputError(f"{name} {asked} needs several processes; start with torchrun")
    for name in ("dit_fsdp", "t5_fsdp"):
        if getattr(options, name):
            raise InputError(f"{name} True needs several processes; start with torchrun")
    _run(request, options, pick_device(options.device), None)


def _run(request: Request, options: Options, device: torch.device, processes: DistributedContext | None) -> None:
    check_memory(options.memory, device, processes, options.offload)
    if device.type == "cuda" if options.compile is None else options.compile:
        check_compiler(device)
    if processes is None or processes.rank == 0:
        _check_files(options, {request.save_file.absolute()} if request.save_file else set())
    checkpoint, videos = settle(request, device)
    if (options.replicas or 1) > len(videos):
        raise InputError(f"replicas {options.replicas} are more than the prompts, {len(videos)}; lower it")
    if processes is None or processes.rank == 0:
        _say_what_runs(checkpoint, videos, request)
        videos = _still_to_make(videos, request, options)
    if processes is not None:
        videos = processes.broadcast_object(videos)
    if not videos:
        return
    if processes is not None:
        every = [settings for settings, _ in videos]
        layout = choose_layout(
            processes.world_size,
            min(checkpoint.heads, *(math.prod(one.video.token_grid) for one in every)),
            # Branches that share masks have to take turns.
            guided=all(one.sampling.guide_scale != 1 and one.attention.mask_refresh == 1 for one in every),
            prompts=len(every),
            sharded=options.dit_fsdp or options.t5_fsdp,
            replicas=options.replicas,
            cfg=options.cfg_size,
            ulysses=options.ulysses_size,
        )
        log.info("layout: %s", layout.describe())
        processes.init_meshes(layout)
    options = replace(options, named_apart=request.prompt_file is not None, again=request.config)
    make_all(checkpoint, videos, device, options, processes)


def settle(request: Request, device: torch.device) -> tuple[Checkpoint, list[Video]]:
    """The checkpoint of a request, and the settings and path of each of its videos.

    Everything that can be checked without the checkpoint is checked before it is looked for.
    """
    flags, config = request.flags, request.config
    from_file = {} if config is None else read_settings(config)
    if "checkpoint" not in flags:
        _check_task(request.task, config, from_file.get("checkpoint"))
    jobs: list[tuple[dict[str, Any], str | None]] = [({}, None)]
    if request.prompt_file is not None:
        jobs = read_prompts(request.prompt_file)
    settings = resolve(jobs[0][0], flags, from_file, {"checkpoint": request.default_checkpoint})
    if request.save_file is not None:
        check_output(request.save_file)
    own_dtype = "float32" if device.type == "cpu" else "bfloat16"
    if settings.fp8:
        check_quantization("fp8", device, getattr(torch, settings.dtype or own_dtype))
    if settings.transformer is not None:
        check_transformer_file(settings.transformer)
    for lora in settings.lora:
        weight_file("lora", lora.file, (SAFETENSORS,))
    if settings.checkpoint == request.default_checkpoint and Path(settings.checkpoint).is_absolute():
        _check_small(Path(settings.checkpoint))
    checkpoint = Checkpoint.open(settings.checkpoint, with_transformer=settings.transformer is None)
    checkpoint.require_tokenizer()
    every = []
    for layer, _ in jobs:
        settings = checkpoint.resolve(layer, flags, from_file)
        if settings.dtype is None:
            settings = replace(settings, model=replace(settings.model, dtype=own_dtype))
        settings.video.check_positions(checkpoint.positions)
        # Of one video the seed is part of what its name stands for; of a list a second run should find those made.
        every.append(settings if request.prompt_file else settings.with_seed())
    folder = request.save_dir or Path()
    names = (given or own for (_, given), own in zip(jobs, names_of(every)))
    paths = [request.save_file or folder / f"{name}{ending(one)}" for name, one in zip(names, every)]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise InputError(f"two prompts would both be {twice[0]}; name one otherwise")
    return checkpoint, list(zip(every, paths))


def _check_small(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(
            f"no checkpoint is named, and the small one, {folder}, comes with the program's source but not with an "
            "installed package; give --ckpt_dir, or --config nabla_0.7.yaml for Wan2.1 14B"
        )


def _check_files(options: Options, pictures: Set[Path]) -> None:
    """Raise `InputError` unless a log and a report can be made, beside videos at absolute paths, before any is."""
    if options.log is not None:
        check_log(options.log)
    if options.report is not None:
        check_report(options.report)
        if options.report.absolute() in pictures:
            raise InputError(f"report {options.report} is the picture's own file; choose another --report")


def _say_what_runs(checkpoint: Checkpoint, videos: list[Video], request: Request) -> None:
    """Log what a user may not know; raises `InputError` for a negative prompt given to videos that take none."""
    every = [settings for settings, _ in videos]
    asked = request.flags.get("sampling", {}).get("negative_prompt")
    if asked and all(settings.sampling.guide_scale == 1 for settings in every):
        raise InputError(f"negative_prompt {asked!r} {NO_GUIDANCE}")
    if request.about_default is not None and checkpoint.name == request.default_checkpoint:
        log.info(request.about_default)
    for line in dict.fromkeys(line for settings in every for line in unexpected(checkpoint, settings)):
        log.warning("warning: %s", line)


def _still_to_make(videos: list[Video], request: Request, options: Options) -> list[Video]:
    """The videos that are not made yet, each with a seed, all of them writable, with their logs and reports.

    Raises `InputError` if one would take the place of another that is finished, unless that is asked for.
    """
    if request.prompt_file is not None:
        flag = "name in the file of prompts, or --save_dir"
        folder = request.save_dir or Path()
        make_folder(folder)
        if not options.overwrite:
            own = names_of(settings for settings, _ in videos)
            named = [path.stem != name for (_, path), name in zip(videos, own)]
            left = still_to_make(videos, folder, named)
            log.info("prompts: %d, of which %d are made already", len(videos), len(videos) - len(left))
            videos = left
        pictures = {path.absolute() for _, path in videos}
        for _, path in videos:
            _check_files(named_after(path, options), pictures)
    else:
        flag = "--save_file"
        if not options.overwrite and is_made(videos[0][1], videos[0][0]):
            log.info("made already: %s; --overwrite makes it again", videos[0][1])
            return []
    for settings, path in videos:
        check_output(path, settings, flag)
        check_free(path, settings, flag, options.overwrite)
    return [(settings.with_seed(), path) for settings, path in videos]


def _check_task(task: str | None, config: str | None, named: object) -> None:
    """Raise `InputError` if a task asks for a model of another size than the hub id that a config names."""
    size = (task or "").rpartition("-")[2]
    if isinstance(named, str) and size not in named and not os.path.isdir(named):
        raise InputError(f"task {task}: config {config} names {named}; leave --task out, or choose with --ckpt_dir")


def unexpected(checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """What a user of a checkpoint may not have meant, though it can be done, a line each."""
    chosen, lines = settings.attention, []
    try:
        own = checkpoint.own_attention()
    except CheckpointError as error:
        lines.append(f"{error}; running {chosen.algorithm} as asked")
        own = None
    if own is not None and own.algorithm != chosen.algorithm:
        lines.append(f"checkpoint {checkpoint.name} was made for {own.algorithm}; running {chosen.algorithm} as asked")
    if not chosen.is_dense and chosen.dense_steps >= settings.sampling.steps:
        lines.append(
            f"the first {chosen.dense_steps} steps run dense, so all {settings.sampling.steps} steps do; "
            "lower dense_steps in a config"
        )
    return [*lines, *_without_guidance(checkpoint, settings), *filter(None, [measured_otherwise(settings)])]


def _without_guidance(checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """What guidance 1 does that may not be meant, unless the checkpoint's own settings are so."""
    sampling = settings.sampling
    if sampling.guide_scale != 1:
        return []
    own, lines = checkpoint.own_sampling(), []
    if sampling.steps <= FEW_STEPS and own.guide_scale != 1 and not (settings.lora or settings.transformer):
        lines.append(
            f"{sampling.steps} steps without guidance suit weights distilled for it, which --lora or --transformer "
            f"add; unless {checkpoint.name} itself is distilled, expect mush"
        )
    if sampling.negative_prompt not in ("", DEFAULT_NEGATIVE_PROMPT, own.negative_prompt):
        lines.append(f"negative_prompt {sampling.negative_prompt!r} {NO_GUIDANCE}")
    return lines


def ending(settings: Settings) -> str:
    return ".png" if settings.video.frame_num == 1 else ".mp4"


def check_output(path: Path, settings: Settings | None = None, flag: str = "--save_file") -> None:
    """Raise `InputError` unless a video and its settings can be written to `path`, as far as can be told beforehand.

    flag: what names the path, or what to choose another of
    """
    many = settings is not None and settings.video.frame_num > 1
    if path.suffix not in (".mp4", ".png") or (path.suffix == ".png" and many):
        kind = f".mp4 for {settings.video.frame_num} frames" if many else ".mp4, or in .png for one frame"
        raise InputError(f"save_file {path} must end in {kind}")
    if path.suffix == ".mp4":
        check_encoder(path.parent)
    check_writable(path, flag)
    check_writable(sidecar_of(path), flag)
    if sidecar_of(path).exists():
        try:
            read_settings(sidecar_of(path))
        except InputError:
            raise InputError(
                f"{sidecar_of(path)} exists and is not the record of a video; choose another {flag}"
            ) from None
    if settings is not None:
        try:
            to_json(settings.to_dict())
        except (TypeError, ValueError) as error:
            raise InputError(f"the settings of {path} cannot be written as its record ({error}); change them") from None
