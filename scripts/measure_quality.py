"""Measure what a checkpoint makes of sentences of the `shapes` data set, and what sparse attention changes about it.

For each attention: the share of videos that show what their sentence says, PSNR and SSIM to the first attention's video
from the same noise, and with --mass the share of blocks kept and of the true attention that they hold.
Prints a table for people, then one line of JSON for programs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nabla import InputError, NablaConfig
from wan import WanT2V, apply_attention
from wan.processes import pick_device
from wan.quality import mass_of_layers, psnr, ssim
from wan.training.accuracy import make_videos, sentences, shares, shown
from wan.video import check_encoder, make_folder, write_json, write_video


def main() -> int:
    args = parse_args()
    try:
        rows = measure(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"settings": {key: str(value) for key, value in vars(args).items()}, "rows": rows}))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt_dir", required=True)
    add("--sparse_algo", nargs="+", default=["dense"], help="attentions; the others are compared with the first")
    add("--count", type=int, default=200, help="sentences")
    add("--split", choices=("train", "held_out"), default="held_out")
    add("--size", help="width*height, the checkpoint's own by default")
    add("--frame_num", type=int, help="frames, the checkpoint's own by default")
    add("--seed", type=int, default=1000)
    add("--batch", type=int, default=1, help="videos sampled together")
    add("--steps", type=int, help="sampling steps, the checkpoint's own by default")
    add("--mass", type=int, default=0, help="measure the attention held, on so many of the sentences; slow")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--save_dir", type=Path, help="where videos go, with what was found in them")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> list[dict]:
    if min(args.count, args.batch) < 1:
        raise InputError(f"count {args.count} and batch {args.batch} must be 1 or more")
    algorithms = {name: NablaConfig.parse(name) for name in args.sparse_algo}
    if args.save_dir:
        make_folder(args.save_dir)
        check_encoder()
    device = pick_device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipe = WanT2V.from_pretrained(args.ckpt_dir, NablaConfig(), device, dtype, compile=False)
    video = {"size": args.size, "frame_num": args.frame_num}
    pipe.video = replace(pipe.video, **{key: value for key, value in video.items() if value is not None})
    if args.steps is not None:
        pipe.sampling = replace(pipe.sampling, steps=args.steps)
    scenes, prompts = zip(*sentences(args.count, args.seed, args.split))
    first, rows = None, []
    for name, config in algorithms.items():
        apply_attention(pipe.transformer, config)
        videos = list(make_videos(pipe, prompts, args.seed, args.batch))
        results = shown(videos, scenes)
        row = {"attention": name} | {key: round(value, 4) for key, value in shares(results).items()}
        if first is None:
            first = videos
        else:
            row["psnr"] = round(statistics.mean(map(psnr, videos, first)), 2)
            row["ssim"] = round(statistics.mean(map(ssim, videos, first)), 4)
        if args.mass and not config.is_dense:
            row |= held(args, pipe, prompts, config)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
        if args.save_dir:
            save(args.save_dir / name, videos, prompts, results, pipe.video.fps)
    return rows


def held(args: argparse.Namespace, pipe: WanT2V, prompts: tuple[str, ...], config: NablaConfig) -> dict[str, float]:
    """Shares of blocks kept and of attention held, over layers, heads, steps and some sentences."""
    with mass_of_layers(pipe.transformer, config) as found:
        for _ in make_videos(pipe, prompts[: args.mass], args.seed, 1):
            pass
    kept, mass = (torch.stack([pair[n] for layer in found.values() for pair in layer]) for n in (0, 1))
    return {"kept": round(kept.mean().item(), 4), "mass": round(mass.mean().item(), 4)}


def save(folder: Path, videos: list, prompts: tuple[str, ...], results: list[dict], fps: int) -> None:
    make_folder(folder)
    for number, (video, prompt, result) in enumerate(zip(videos, prompts, results)):
        path = folder / f"{number:03d}-{'right' if result['all'] else 'wrong'}.mp4"
        write_video(path, video.numpy(), fps)
        write_json(path.with_suffix(".json"), {"prompt": prompt} | result)


if __name__ == "__main__":
    sys.exit(main())
