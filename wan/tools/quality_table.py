"""Measure what a checkpoint makes of sentences of the `shapes` data set, and what sparse attention changes about it.

For each attention: the share of videos that show what their sentence says, PSNR and SSIM to the first attention's video
from the same noise, and with --mass the share of blocks kept and of the true attention that they hold.
Prints a table for people, then one line of JSON for programs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nabla import InputError, NablaConfig
from wan import WanT2V, apply_attention
from wan.config.settings import changed
from wan.files.json_files import write_json
from wan.files.video import check_encoder, check_writable, make_folder, write_image, write_video
from wan.parallel.distributed import pick_device
from wan.shapes.accuracy import make_videos, shares, worker_map
from wan.shapes.measure import score
from wan.shapes.sentences import of_shapes, read_sentences
from wan.tools.quality import measure_mass, psnr, ssim

# Of a picture: sentences in it, and how many pixels high a video is.
PICTURED, PICTURE_HEIGHT = 4, 96


def main() -> int:
    """Measure what the flags ask for, and print it. Raises `InputError` for what cannot be."""
    args = parse_args()
    rows = measure(args)
    print(json.dumps({"settings": {key: str(value) for key, value in vars(args).items()}, "rows": rows}))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt_dir", required=True)
    add(
        "--sparse_algo",
        nargs="+",
        default=["dense"],
        metavar="ATTENTION[@DIR]",
        help="attentions, each on the checkpoint or on another; the others are compared with the first",
    )
    add("--count", type=int, default=200, help="sentences, at most")
    add("--split", choices=("train", "held_out"), default="held_out")
    add("--sentences", type=Path, help="sentences of people instead, such as tests/data/shapes_sentences.yaml")
    add("--size", help="width*height, the checkpoint's own by default")
    add("--frame_num", type=int, help="frames, the checkpoint's own by default")
    add("--seed", type=int, default=1000, help="of the first video; each has the next")
    add("--sentence_seed", type=int, help="of the data set's sentences, that of the videos by default")
    add("--batch", type=int, default=1, help="videos sampled together")
    add("--steps", type=int, help="sampling steps, the checkpoint's own by default")
    add("--shift", type=float, help="of the noise levels, the checkpoint's own by default")
    add("--guide_scale", help="guidance, the checkpoint's own by default")
    add("--mass", type=int, default=0, help="measure the attention held, on so many of the sentences; slow")
    add("--workers", type=int, default=0, help="processes that measure videos, rather than this one")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--save_dir", type=Path, help="where videos go, with what was found in them")
    add("--picture", type=Path, help="a PNG of the first sentences' videos, an attention below the other")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> list[dict]:
    if min(args.count, args.batch) < 1 or args.workers < 0:
        raise InputError(
            f"count {args.count} and batch {args.batch} must be 1 or more, workers {args.workers} 0 or more"
        )
    with worker_map(args.workers) as each:
        return compare(args, each)


def compare(args: argparse.Namespace, each: Callable[..., Iterable]) -> list[dict]:
    """A row for each attention."""
    # "nabla-0.7@DIR" is an attention and a folder, which is "" for --ckpt_dir.
    split = [(name, *name.partition("@")[::2]) for name in args.sparse_algo]
    attentions = [(name, NablaConfig.parse(algorithm), folder) for name, algorithm, folder in split]
    if args.save_dir:
        make_folder(args.save_dir)
        check_encoder()
    if args.picture:
        check_writable(args.picture)
    prompts, wanted = zip(*read_prompts(args))
    opened, first, rows, strips = None, None, [], []
    for name, config, folder in attentions:
        folder = folder or args.ckpt_dir
        if opened != folder:
            pipe, opened = open_pipeline(args, folder), folder
        apply_attention(pipe.transformers, config)
        videos: list[Tensor] = []
        # Measured while others are made.
        results = list(each(score, collect_into(videos, make_videos(pipe, prompts, args.seed, args.batch)), wanted))
        row = {"attention": name} | {key: round(value, 4) for key, value in shares(results).items()}
        if first is None:
            first = videos
        else:
            for measure_of in (psnr, ssim):
                likeness = [measure_of(*(one.to(pipe.device) for one in pair)) for pair in zip(videos, first)]
                row[measure_of.__name__] = round(statistics.mean(likeness), 4)
        if args.mass and not config.is_dense:
            row |= attention_held(args, pipe, prompts, config)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
        strips.append(np.concatenate([strip(video) for video in videos[:PICTURED]], axis=1))
        if args.save_dir:
            save(args.save_dir / name.replace("/", "_"), videos, prompts, results, pipe.video.fps)
    if args.picture:
        write_image(args.picture, np.concatenate(strips))
    return rows


def collect_into(found: list[Tensor], videos: Iterable[Tensor]) -> Iterator[Tensor]:
    """The videos, each put into a list on its way."""
    for video in videos:
        found.append(video)
        yield video


def read_prompts(args: argparse.Namespace) -> list[tuple[str, dict[str, str]]]:
    """Sentences and what they say of shapes."""
    if args.sentences is None:
        return of_shapes(args.count, args.seed if args.sentence_seed is None else args.sentence_seed, args.split)
    return [(text, named) for text, named in read_sentences(args.sentences) if "shapes" in named][: args.count]


def open_pipeline(args: argparse.Namespace, folder: str) -> WanT2V:
    """A checkpoint, with what the flags say of its videos."""
    device = pick_device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    # Not compiled, as `measure_mass` needs it; the attention of each row is put in afterwards.
    pipe = WanT2V.from_pretrained(folder, NablaConfig(), device, dtype, compile=False)
    pipe.video = changed(pipe.video, size=args.size, frame_num=args.frame_num)
    pipe.sampling = changed(pipe.sampling, steps=args.steps, shift=args.shift, guide_scale=args.guide_scale)
    return pipe


def strip(video: Tensor) -> np.ndarray:
    """Its first, middle and last frame side by side, (height, 3 width, 3) uint8, small."""
    frames = video[[0, len(video) // 2, -1]].permute(0, 3, 1, 2).float()
    small = F.interpolate(frames, scale_factor=PICTURE_HEIGHT / frames.shape[2], mode="bilinear", antialias=True)
    return torch.cat(list(small), 2).permute(1, 2, 0).round().to(torch.uint8).numpy()


def attention_held(
    args: argparse.Namespace, pipe: WanT2V, prompts: tuple[str, ...], config: NablaConfig
) -> dict[str, float]:
    """Shares of blocks kept and of attention held, over layers, heads, steps and some sentences."""
    with measure_mass(pipe.transformer, config) as found:
        for _ in make_videos(pipe, prompts[: args.mass], args.seed, 1):
            pass
    # A list for each layer of a pair for each forward, of a number a head.
    kept, mass = (torch.stack([pair[n] for layer in found.values() for pair in layer]) for n in (0, 1))
    return {"kept": round(kept.mean().item(), 4), "mass": round(mass.mean().item(), 4)}


def save(folder: Path, videos: list, prompts: tuple[str, ...], results: list[dict], fps: int) -> None:
    make_folder(folder)
    for number, (video, prompt, result) in enumerate(zip(videos, prompts, results)):
        path = folder / f"{number:03d}-{'right' if result['all'] else 'wrong'}.mp4"
        write_video(path, video.numpy(), fps)
        write_json(path.with_suffix(".json"), {"prompt": prompt} | result)
