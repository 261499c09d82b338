"""Measure how much what a checkpoint's blocks add grows from step to step: the ratios that `--cache mag` needs.

They hold for the checkpoint, attention, solver, shift, guidance and steps that they are measured with, which the file
says. A video is sampled in full for each prompt of the file, and not decoded. Further flags are those of generate.py
that say what runs and how: --ckpt_dir, --config, --transformer, --lora, --sparse_algo, --size, --frame_num, --sample_*,
--negative_prompt, --mask_refresh, --fp8, --dtype, --device, --memory, --offload_model, --t5_cpu, --compile.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.caches.calibration import calibrated
from wan.config.inputs import each_file
from wan.config.settings import Settings
from wan.files.json_files import write_json
from wan.files.video import check_writable
from wan.memory.budget import check_memory
from wan.observe.console import log_to_stderr
from wan.observe.recorder import with_progress
from wan.parallel.distributed import pick_device
from wan.run.advice import unexpected
from wan.run.flags import SMALL_CHECKPOINT, Parser, flag_settings, options_of
from wan.run.flags import parse_args as parse_run
from wan.run.generation import load_pipeline
from wan.run.ratios import conditions
from wan.run.request import Request
from wan.run.settle import settle
from wan.sampling.guided import GuidedPipeline, sample_latents
from wan.sampling.request import VideoRequest

log = logging.getLogger("wan")

# What generate.py does and this does not.
UNSUPPORTED_FLAGS = "task cache save_dir log_file report cfg_size ulysses_size replicas t5_fsdp dit_fsdp".split()


def main() -> int:
    """Measure and write the ratios that the flags ask for. Raises `InputError` for what cannot be."""
    args = parse_args()
    log_to_stderr()
    check_writable(args.out, "--out")
    result = measure(args)
    write_json(args.out, result)
    print(f"{args.out}: {', '.join(f'{ratio:.4f}' for ratio in result['ratios'])}")
    return 0


def parse_args() -> argparse.Namespace:
    """generate.py's flags, and this program's own besides."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--prompt_file", required=True, help="a few prompts that differ, a line each, as for generate.py")
    add("--out", type=Path, required=True, help="a JSON file, for `--cache mag:0.06:FILE` or `ratios` in a config")
    add("--steps", help="the same as --sample_steps")
    add("--seed", type=int, default=0, help="of the first prompt, the next count on, where none is given (default: 0)")
    own, rest = parser.parse_known_args()
    steps = [] if own.steps is None else ["--sample_steps", own.steps]
    args = parse_run([*rest, *steps, "--prompt_file", own.prompt_file])
    for name in UNSUPPORTED_FLAGS:
        if getattr(args, name):
            parser.error(f"--{name} is not for measuring ratios; leave it out")
    return argparse.Namespace(**vars(args) | {"out": own.out, "seed": own.seed})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The ratios, and what they were measured on."""
    device = pick_device(args.device)
    options = options_of(args)
    check_memory(options.memory, device, None, options.offload)
    # A cache would leave out the forwards that are to be measured.
    flags = flag_settings(args) | {"cache": "none"}
    request = Request(flags, args.config, None, SMALL_CHECKPOINT, prompt_file=args.prompt_file)
    checkpoint, videos = settle(request, device)
    every = [settings for settings, _ in videos]
    if files := [file for one in every for file in each_file(one.inputs)]:
        name, path = files[0]
        raise InputError(f"{name} {path}: ratios are measured on videos of text alone; leave it out")
    for line in unexpected(checkpoint, every[0]):
        log.warning("warning: %s", line)
    pipe = load_pipeline(checkpoint, every, device, options)
    sampled = []
    with calibrated(pipe.transformers, pipe.transformer_spec) as calibration:
        for number, settings in enumerate(every):
            given = settings.sampling.seed
            # A seed of its own for each video, which the file names, so that it can be measured again.
            seed = args.seed + number if given in (None, -1) else given
            sample(pipe, settings, seed)
            video = {"size": list(settings.video.size), "frame_num": settings.video.frame_num, "seed": seed}
            sampled.append({"prompt": settings.prompt, "negative_prompt": settings.sampling.negative_prompt} | video)
        ratios = calibration.ratios()
    return {"ratios": ratios, "measured_on": conditions(every[0]), "videos": sampled}


def sample(pipe: GuidedPipeline, settings: Settings, seed: int) -> None:
    """Sample a video, without decoding it."""
    sampling = replace(settings.sampling, seed=seed)
    conditions = pipe.encode(VideoRequest(settings.prompt or "", settings.video, sampling))
    noise = pipe.draw_noise(settings.video, seed)
    sample_latents(pipe, noise, conditions, sampling, with_progress(True, None))
