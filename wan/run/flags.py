"""The command line of a run, and what other programs share of it.

Imports nothing heavy: --help and a mistyped flag should not wait for torch.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from wan.observe.console import printable
from wan.run.flag_types import boolean, files, scales, transformers
from wan.run.request import Options, Request
from wan.run.tasks import TASKS, checkpoint_of

# As `nabla.config` has it, from where it would import torch.
MAX_MESSAGE = 2000
# What runs if nothing names a checkpoint, and what is said then.
SMALL_CHECKPOINT = str(Path(__file__).resolve().parents[2] / "checkpoints" / "wan-shapes")
ABOUT_SMALL = (
    "checkpoint: checkpoints/wan-shapes, a small model that knows moving shapes and comes with the program; "
    "for Wan2.1 14B add --config nabla_0.7.yaml (69 GB are downloaded once) or --ckpt_dir"
)
# As `wan.config.inputs` has them, from where it would import torch.
INPUT_FLAGS = ("image", "last_image", "src_video", "src_mask", "src_ref_images")
# Flags that several programs have.
SHARED: dict[str, dict[str, Any]] = {
    "--device": {"help": "cuda, cuda:1, cpu (default: cuda if there is one)"},
    "--dtype": {
        # Spelled out: the module that has them as `DTYPES` imports torch.
        "choices": ("bfloat16", "float16", "float32"),
        "help": "default: bfloat16 on a GPU, float32 on the CPU",
    },
    "--memory": {"help": "auto, or GB of the GPU to stay under: chooses offloading, precision and tiles, and says so"},
    "--t5_cpu": {"action": "store_true", "help": "run the text encoder on the CPU"},
}


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage before it, which of so many flags fills a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)[:MAX_MESSAGE]} (see --help)\n")


def add_shared(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add flags of `SHARED` to a program's parser."""
    for name in names:
        parser.add_argument(name, **SHARED[name])


def make_parser(description: str | None = None) -> Parser:
    """The parser of generate.py."""
    parser = Parser(description=description)
    # In the order in which --help lists them.
    _add_what_is_made(parser)
    _add_weights(parser)
    _add_video(parser)
    _add_sampling(parser)
    _add_how_it_runs(parser)
    _add_processes_and_logs(parser)
    return parser


def _add_what_is_made(parser: Parser) -> None:
    """Flags of prompts, and of files that say what is made."""
    add = parser.add_argument
    add("--prompt", help="what the video shows")
    add(
        "--expand_prompt",
        type=boolean,
        nargs="?",
        const=True,
        help="have the checkpoint's language model write the prompt out first (Kandinsky-5); false, if a config does",
    )
    _add_inputs(parser)
    add(
        "--config",
        help="a YAML file, by path or by name in configs/; or the JSON file beside a video, to make it again",
    )
    add(
        "--task",
        choices=TASKS,
        help="as the published program names what a checkpoint is for; picks that if nothing else names one, and "
        "refuses others; t2i makes one picture",
    )


def _add_weights(parser: Parser) -> None:
    """Flags of a checkpoint, of what takes the place of its parts or is added to them, and of its attention."""
    add = parser.add_argument
    add("--ckpt_dir", help="checkpoint: a directory or a hub id (default: the small one in checkpoints/wan-shapes)")
    add(
        "--transformer",
        action="append",
        metavar="[EXPERT:]FILE",
        help="weights in place of the checkpoint's transformer: .safetensors or .gguf; of one of Wan2.2's two experts "
        "with high: or low: before it, given once for each",
    )
    add("--vae", metavar="DIR", help="the VAE, where the checkpoint has none or another is to be used; or its hub id")
    add("--text_encoder", metavar="DIR", help="the same of the text encoder, its tokenizer in the same folder")
    add("--text_encoder_2", metavar="DIR", help="the same of the second text encoder of Kandinsky-5, CLIP")
    add(
        "--lora",
        action="append",
        metavar="[EXPERT:]FILE[:SCALE]",
        help="a LoRA to merge into the transformer, .safetensors; may be given several times (default scale: 1); "
        "with high: or low: before it, into that expert of Wan2.2 alone",
    )
    add("--sparse_algo", help="attention: dense, nabla-0.7, keep-0.2, nabla-0.6_sta-11-3-3 (blocks), profile:FILE")


def _add_video(parser: Parser) -> None:
    """Flags of the video's size, seed and file, and of lists of videos."""
    add = parser.add_argument
    add("--negative_prompt", help="what the video should not show")
    add("--size", help="width*height in pixels, such as 1280*720; multiples of 16; with a picture the area alone")
    add(
        "--exact_size",
        type=boolean,
        nargs="?",
        const=True,
        help="with a picture or a source video: --size is the very size, and not only the area",
    )
    add("--frame_num", type=int, help="frames, 4n+1")
    add("--base_seed", type=int, help="seed of the noise; -1 draws one")
    add(
        "--prompt_file", type=Path, help="a video a line: a prompt, or a JSON object with prompt, seed, size, name, ..."
    )
    add("--save_dir", type=Path, help="where the videos of --prompt_file go (default: the working directory)")
    add("--save_file", type=Path, help="output, .mp4 (or .png for t2i); the settings go beside it as .json")
    add("--overwrite", action="store_true", help="make videos again that are there; else none takes another's place")


def _add_inputs(parser: Parser) -> None:
    """Flags of what a video is made of beside its prompt."""
    add = parser.add_argument
    add("--image", metavar="FILE", help="a picture that the video begins with, for checkpoints that take one")
    add("--last_image", metavar="FILE", help="a picture that it ends with, beside --image (FLF2V)")
    add("--src_video", metavar="FILE", help="a video to keep parts of, by --src_mask, or to follow, as of poses (VACE)")
    add("--src_mask", metavar="FILE", help="a video, or a picture, white where --src_video is made anew")
    add(
        "--src_ref_images",
        type=files,
        action="extend",
        metavar="FILE,...",
        help="pictures of what the video is to show (VACE), with commas between; may be given several times",
    )


def _add_sampling(parser: Parser) -> None:
    """Flags of the steps from noise to latents."""
    add = parser.add_argument
    add("--sample_solver", help="unipc, dpm++ or euler")
    add("--sample_steps", type=int)
    add("--sample_shift", type=float)
    add(
        "--sample_guide_scale",
        type=scales,
        metavar="SCALE[,SCALE]",
        help="1 turns guidance off and halves the time; for Wan2.2's two experts also two, of low noise and of high",
    )
    add("--context_scale", type=float, help="how strongly --src_video and the like guide a video (default: 1.0)")


def _add_how_it_runs(parser: Parser) -> None:
    """Flags of where and in which precision models run."""
    add = parser.add_argument
    add(
        "--offload_model", type=boolean, nargs="?", const=True, help="keep idle components in host memory (true, false)"
    )
    add_shared(parser, "--memory", "--t5_cpu")
    add("--compile", type=boolean, help="compile the transformer's blocks (default: true on a GPU)")
    add_shared(parser, "--device", "--dtype")
    add(
        "--fp8",
        type=boolean,
        nargs="?",
        const=True,
        help="the transformer's linear layers in float8 (Ada GPUs and newer, torchao); false, if a config asks for it",
    )
    add(
        "--vae_dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the VAE's decoder; default: on a GPU float16, unless --dtype is float32",
    )
    add(
        "--cache",
        metavar="KIND[:LIMIT[:RATIOS]]",
        help="reuse what blocks computed in earlier steps: first_block:THRESHOLD, mag:THRESHOLD:RATIOS, "
        "taylorseer:INTERVAL, none; such as taylorseer:2",
    )
    add("--mask_refresh", type=int, help="steps for which each layer keeps the blocks that it chose (default: 1)")


def _add_processes_and_logs(parser: Parser) -> None:
    """Flags of runs under torchrun, and of what is written of a run."""
    add = parser.add_argument
    add("--cfg_size", type=int, help="under torchrun: 2 runs the guidance branches side by side (default: chosen)")
    add("--ulysses_size", type=int, help="under torchrun: GPUs that share a sequence of tokens (default: chosen)")
    add("--replicas", type=int, help="under torchrun: videos of --prompt_file made side by side (default: chosen)")
    add("--t5_fsdp", action="store_true", help="shard the text encoder over the GPUs that share a video")
    add("--dit_fsdp", action="store_true", help="shard the transformer over the GPUs that share a video")
    # torchrun, which may read the whole line first, takes a bare --log for several of its own.
    add(
        "--log_file",
        "--log",
        type=Path,
        metavar="FILE",
        help="what each layer keeps and takes in each step, a JSON object a line: .jsonl",
    )
    add("--report", type=Path, help="a picture of it, .png; needs matplotlib")


def parse_args(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """The flags of generate.py, as far as they contradict each other without a checkpoint."""
    parser = make_parser(description)
    args = parser.parse_args(argv)
    if args.task == "t2i-14B" and args.frame_num not in (None, 1):
        parser.error(f"frame_num {args.frame_num}: task t2i-14B makes one picture; leave --frame_num out")
    if args.task == "t2i-14B" and args.save_file is not None and args.save_file.suffix != ".png":
        parser.error(f"save_file {args.save_file}: task t2i-14B makes a picture; end it in .png")
    if args.prompt_file is not None and (args.prompt is not None or args.save_file is not None):
        parser.error("--prompt_file has prompts and names of its own; leave --prompt and --save_file out")
    if args.save_dir is not None and args.prompt_file is None:
        parser.error("--save_dir is for --prompt_file; name a single video with --save_file")
    try:
        args.transformer = transformers(args.transformer)
    except ValueError as error:
        parser.error(str(error))
    return args


def flag_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, in the schema of the YAML files."""

    def given(**values: Any) -> dict[str, Any]:
        return {key: value for key, value in values.items() if value is not None}

    return given(
        checkpoint=args.ckpt_dir,
        prompt=args.prompt,
        **{name: getattr(args, name) for name in INPUT_FLAGS},
        expand_prompt=args.expand_prompt,
        transformer=args.transformer,
        vae=args.vae,
        text_encoder=args.text_encoder,
        text_encoder_2=args.text_encoder_2,
        lora=args.lora,
        dtype=args.dtype,
        vae_dtype=args.vae_dtype,
        fp8=args.fp8,
        cache=args.cache,
        attention=given(algorithm=args.sparse_algo, mask_refresh=args.mask_refresh),
        sampling=given(
            solver=args.sample_solver,
            steps=args.sample_steps,
            shift=args.sample_shift,
            guide_scale=args.sample_guide_scale,
            seed=args.base_seed,
            negative_prompt=args.negative_prompt,
            context_scale=args.context_scale,
        ),
        video=given(
            size=args.size,
            exact_size=args.exact_size,
            frame_num=1 if args.task == "t2i-14B" else args.frame_num,
        ),
    )


def options_of(args: argparse.Namespace) -> Options:
    """How to run, of the flags that a program has of generate.py's."""
    # Imported once there is something to do, since it imports torch.
    from wan.memory.budget import parse_memory

    # Flags that are named otherwise than their options; all others are named alike.
    own = {"offload_model": "offload", "log_file": "log"}
    flags = {own.get(name, name): value for name, value in vars(args).items()}
    given = {item.name: flags[item.name] for item in fields(Options) if item.name in flags}
    if given.get("memory") is not None:
        given["memory"] = parse_memory(given["memory"])
    return Options(**given)


def request_of(args: argparse.Namespace) -> Request:
    """What generate.py's flags ask for."""
    return Request(
        flag_settings(args),
        config=args.config,
        task=args.task,
        default_checkpoint=SMALL_CHECKPOINT if args.task is None else checkpoint_of(args.task, args.size),
        about_default=ABOUT_SMALL if args.task is None else None,
        save_file=args.save_file,
        prompt_file=args.prompt_file,
        save_dir=args.save_dir,
    )
