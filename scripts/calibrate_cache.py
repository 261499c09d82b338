"""Measure how much what a checkpoint's blocks add grows from step to step: the ratios that `--cache mag` needs.

They hold for the checkpoint, attention, solver, shift and guidance that they are measured with; other numbers of steps
take the nearest. A video is sampled in full for each prompt, and not decoded.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nabla import InputError
from wan import WanT2V
from wan.config import changed
from wan.jobs import read_prompts
from wan.processes import pick_device
from wan.step_cache import calibrated
from wan.video import check_writable, write_json


def main() -> int:
    args = parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    try:
        check_writable(args.out)
        result = measure(args)
        write_json(args.out, result)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {', '.join(f'{ratio:.4f}' for ratio in result['ratios'])}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt_dir", required=True, help="checkpoint: a directory or a hub id")
    add("--prompt_file", type=Path, required=True, help="a prompt a line; a few that differ are enough")
    add("--out", type=Path, required=True, help="a JSON file, for `--cache mag:0.06:FILE` or `ratios` in a config")
    add("--sparse_algo", help="attention, the checkpoint's own by default")
    add("--size", help="width*height, the checkpoint's own by default")
    add("--frame_num", type=int, help="frames, the checkpoint's own by default")
    add("--steps", type=int, help="sampling steps, the checkpoint's own by default")
    add("--seed", type=int, default=0)
    add("--fp8", action="store_true", help="with the transformer's linear layers in float8")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict:
    """The ratios, and what they were measured on."""
    prompts = [layer["prompt"] for layer, _ in read_prompts(args.prompt_file)]
    device = pick_device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipe = WanT2V.from_pretrained(args.ckpt_dir, args.sparse_algo, device, dtype, fp8=args.fp8, cache="none")
    video = changed(pipe.video, size=args.size, frame_num=args.frame_num)
    sampling = changed(pipe.sampling, steps=args.steps)
    negative = pipe.encode_text(*pipe.tokenize(sampling.negative_prompt))
    with calibrated(pipe.transformer) as calibration:
        for number, prompt in enumerate(prompts):
            context = pipe.encode_text(*pipe.tokenize(prompt))
            noise = pipe.draw_noise(video, args.seed + number)
            pipe.sample(context, negative, noise=noise, steps=sampling.steps, progress=True)
        ratios = calibration.ratios()
    walk = {key: value for key, value in asdict(sampling).items() if key not in ("seed", "negative_prompt")}
    attention = pipe.transformer.nabla.config.algorithm
    about = {"checkpoint": args.ckpt_dir, "attention": attention, "fp8": args.fp8, "size": video.size} | walk
    return {"ratios": ratios, "measured_on": about | {"frame_num": video.frame_num, "prompts": prompts}}


if __name__ == "__main__":
    sys.exit(main())
