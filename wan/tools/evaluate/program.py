"""Compare settings of attention on whole videos of a checkpoint: likeness to the dense ones, CLIP score, time.

Every prompt is made with the same seeds by dense attention, once, and by each setting. A run that is cut goes on where
it was; settings, prompts at the end and seeds may be added later. Prints a table for people, then one line of JSON for
programs; the folder has all of it, with a sheet of frames, videos side by side, and folders for VBench. Further flags
are those of generate.py that say what runs and how: --ckpt_dir, --config, --task, --transformer, --lora, --size,
--frame_num, --sample_*, --base_seed, --negative_prompt, --fp8, --dtype, --device, --memory, --offload_model, --t5_cpu,
--compile, and under torchrun --cfg_size, --ulysses_size, --replicas, --t5_fsdp, --dit_fsdp.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from nabla import InputError, NablaConfig
from wan.attention.compile import check_compiler
from wan.checkpoints.fingerprints import fingerprint_files
from wan.config.settings import Settings
from wan.files.formats import SAFETENSORS
from wan.files.hashes import text_hash
from wan.memory.budget import check_memory
from wan.models.checkpoint import Checkpoint
from wan.observe.console import log_to_stderr, positive
from wan.parallel.distributed import DistributedContext, pick_device, started_by_torchrun
from wan.run.advice import unexpected
from wan.run.flags import Parser, options_of, request_of
from wan.run.flags import parse_args as parse_run
from wan.run.generation import load_pipeline
from wan.run.run import check_alone, lay_out
from wan.run.settle import settle
from wan.sampling.guided import GuidedPipeline
from wan.tools.evaluate.compared import Compared, held_against, read_compared, stands_alone
from wan.tools.evaluate.evaluation import Plan, evaluate
from wan.tools.evaluate.folder import Folder
from wan.tools.evaluate.jobs import PROMPTS, Job, find_prompts, jobs_of
from wan.tools.evaluate.table import table_of

log = logging.getLogger("wan")

# Of their size as numbers, what frames take that are written to the bit: about, for it depends on what they show.
LOSSLESS_SHARE = 0.45
# What generate.py does and this does not, and what to do instead.
UNSUPPORTED = {
    "prompt": "give --prompt_file",
    "sparse_algo": "give --settings",
    "mask_refresh": "write it in a file that --settings names",
    "cache": "write it in a file that --settings names",
    "save_file": "give --out",
    "save_dir": "give --out",
    "log_file": "leave it out",
    "report": "leave it out",
    "overwrite": "give another --out",
}


def main() -> int:
    """Compare what the flags ask for. Raises `InputError` for what cannot be."""
    args = parse_args()
    log_to_stderr()
    if not started_by_torchrun():
        check_alone(options_of(args))
        run(args, pick_device(args.device), None)
        return 0
    with DistributedContext.join(args.device) as processes:
        log.setLevel(logging.INFO if processes.rank == 0 else logging.WARNING)
        run(args, processes.device, processes)
    return 0


def parse_args() -> argparse.Namespace:
    """generate.py's flags, and this program's own besides."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--settings",
        nargs="+",
        default=[],
        metavar="SETTING",
        help="algorithms such as nabla-0.7 or profile:FILE, or YAML files",
    )
    add("--out", type=Path, required=True, help="a folder, a new one or that of the same evaluation")
    prompts = "as for generate.py, by path or by name in configs/prompts (default: 50 that come with the program)"
    add("--prompt_file", type=Path, default=Path(PROMPTS), help=prompts)
    add("--prompts", type=positive, help="only so many of them, from the first")
    add("--seeds", type=positive, default=1, help="videos of each prompt (default: 1)")
    add("--against", help="the setting that others are held against (default: the first of --settings)")
    add("--clip", metavar="DIR", help="a CLIP for the CLIP score: a folder or a hub id of transformers' CLIPModel")
    add("--shown", type=positive, default=6, help="prompts on the sheet and side by side (default: 6)")
    add("--only_measure", action="store_true", help="make no videos: measure and tell what is there")
    own, rest = parser.parse_known_args()
    # Without its own, --prompt and --save_file would be told apart by generate.py alone.
    args = parse_run(rest)
    for name, remedy in UNSUPPORTED.items():
        if getattr(args, name):
            parser.error(f"--{name} is not for comparing settings; {remedy}")
    return argparse.Namespace(**vars(args) | vars(own))


def run(args: argparse.Namespace, device: torch.device, processes: DistributedContext | None) -> None:
    """Compare on these processes, and print what came out on the first."""
    options = options_of(args)
    # What is wrong in them is said before a checkpoint is looked for, unless it takes that to know.
    if all(map(stands_alone, args.settings)):
        held_against(read_compared(args.settings), args.against)
    check_memory(options.memory, device, processes, options.offload)
    if device.type == "cuda" if options.compile is None else options.compile:
        check_compiler(device)
    checkpoint, jobs = settle_jobs(args, device)
    compared = read_compared(args.settings, checkpoint)
    against = held_against(compared, args.against)
    every = [one.of(job.settings) for one in compared for job in jobs]
    leads = processes is None or processes.rank == 0
    if leads:
        say_what_runs(checkpoint, jobs, compared)
    if processes is not None:
        lay_out(processes, checkpoint, every, options)
    about = made_on(checkpoint, jobs[0].settings, device, processes)
    plan = Plan(jobs, compared, against, Folder(args.out), device, options, args.clip, args.shown, about)

    def open_pipe() -> GuidedPipeline:
        return load_pipeline(checkpoint, every, device, options, processes)

    with plan.folder.locked() if leads else nullcontext():
        found = evaluate(plan, open_pipe, processes, makes=not args.only_measure)
    if found is not None:
        print(table_of(found))
        print(json.dumps({key: value for key, value in found.items() if key != "videos"}), flush=True)


def settle_jobs(args: argparse.Namespace, device: torch.device) -> tuple[Checkpoint, list[Job]]:
    """The checkpoint, and the videos of every prompt by the dense baseline, whatever attention it names itself."""
    request = request_of(args)
    # The seed is that of the first prompt, and not of all.
    sampling = {key: value for key, value in request.flags["sampling"].items() if key != "seed"}
    flags = {**request.flags, "cache": "none", "attention": {"algorithm": "dense"}, "sampling": sampling}
    request = replace(request, flags=flags, prompt_file=find_prompts(args.prompt_file), about_default=None)
    checkpoint, videos = settle(request, device)
    every = [replace(one, model=replace(one.model, attention=NablaConfig())) for one, _ in videos]
    if any(one.expand_prompt for one in every):
        raise InputError(
            "expand_prompt would write other texts each time; give --expand_prompt false, and texts as meant"
        )
    return checkpoint, jobs_of(every[: args.prompts], args.seeds, args.base_seed or 0)


def say_what_runs(checkpoint: Checkpoint, jobs: list[Job], compared: list[Compared]) -> None:
    """Log how much it is, and what a user may not have meant."""
    prompts, takes = len({job.prompt for job in jobs}), len({job.take for job in jobs})
    log.info("settings: %s", ", ".join(one.name for one in compared))
    log.info(
        "%d prompts, %d seeds each, %d settings: %d videos", prompts, takes, len(compared), len(jobs) * len(compared)
    )
    pixels = sum(math.prod(job.settings.video.size) * job.settings.video.frame_num for job in jobs) * len(compared)
    log.info("frames: about %.1f GB, kept to the bit until all is measured", 3 * pixels * LOSSLESS_SHARE / 1e9)
    sparse = [one for one in compared if not one.is_baseline]
    lines = (line for one in sparse for job in jobs for line in unexpected(checkpoint, one.of(job.settings)))
    for line in dict.fromkeys(lines):
        log.warning("warning: %s", line)
    for one in sparse:
        checkpoint.family.require(cache=one.cache)


def made_on(
    checkpoint: Checkpoint, settings: Settings, device: torch.device, processes: DistributedContext | None
) -> dict[str, Any]:
    """What videos and times depend on beside settings."""
    return {
        "weights": _fingerprint(checkpoint, settings),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "processes": 1 if processes is None else processes.layout.processes_per_video,
    }


def _fingerprint(checkpoint: Checkpoint, settings: Settings) -> str:
    """Of the files of weights that are run: what is in them where that is read at once, else their sizes."""
    given = [Path(one) for one in (*settings.model.transformer_files.values(), *(lora.file for lora in settings.lora))]
    files = sorted(path for path in checkpoint.folder.rglob("*") if path.suffix in (SAFETENSORS, ".pth", ".gguf"))
    every = [*files, *given]
    named = [f"{path.name} {path.stat().st_size}" for path in every]
    try:
        named.append(fingerprint_files(path for path in every if path.suffix == SAFETENSORS))
    # Of a damaged file more is said when it is loaded.
    except SafetensorError:
        pass
    return text_hash("\n".join(named))[:16]
