"""Distilling the checkpoint to the study's rule: data drawn here, its own dense attention as the teacher."""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path

import torch

from wan.config.config_files import read_settings
from wan.tools.datasets import open_dataset
from wan.tools.study.settings import Setting
from wan.training.config import TrainingSettings
from wan.training.encoder import Encoder
from wan.training.metrics import METRICS_FILE, read_metrics
from wan.training.models import open_components
from wan.training.prepare import prepare
from wan.training.prepare_settings import PrepareSettings
from wan.training.schema import merge_settings, to_plain
from wan.training.trainer import Trainer

log = logging.getLogger("wan")

# Those of the repository's own training, see scripts/train_shapes.sh.
PREPARE, TRAIN = "training/prepare_shapes.yaml", "training/shapes_distill.yaml"
# Beyond all clips that the checkpoint was trained with.
OFFSET = 500_000
HELD_OUT = 32


def distilled(args: argparse.Namespace, setting: Setting, layers: int, device: torch.device) -> Path:
    """A folder of weights distilled with a setting's attention; a second start goes on where it was cut."""
    data = args.out / "data"
    make_data(args, data / "train", args.clips, device)
    make_data(args, data / "held_out", min(HELD_OUT, args.clips), device, "held_out")
    folder = args.out / f"distilled_{setting.share:g}"
    config = setting.config(layers)
    attention = {"keep": config.keep, "pool": config.pool, "dense_layers": config.dense_layers}
    changes = {
        "checkpoint": str(args.ckpt_dir),
        "out": str(folder),
        "steps": args.distill_steps,
        "attention": {name: to_plain(value) for name, value in attention.items() if value},
        "data": {"train": str(data / "train"), "validation": str(data / "held_out"), "clips": HELD_OUT},
        "every": {"checkpoint": args.distill_steps, "validation": args.distill_steps, "sample": args.distill_steps},
        "batch_size": args.distill_batch,
        "micro_batch": args.distill_batch,
        "compile": device.type == "cuda",
        "workers": min(4, args.workers),
    }
    # Merged key by key, but for attention, which is another one.
    base = {name: value for name, value in read_settings(TRAIN).items() if name != "attention"}
    with contextlib.closing(Trainer(TrainingSettings.from_dict(merge_settings(base, changes)))) as trainer:
        trainer.run()
    return folder / "latest" / "ema"


def losses(weights: Path) -> dict[str, list[float]]:
    """The losses on held-out clips, with dense attention and with sparse, before the first step and after the last."""
    rows = read_metrics(weights.parent.parent / METRICS_FILE)
    names = sorted({name for row in rows for name in row if name.startswith("validation_")})
    of = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: [some[0], some[-1]] for name, some in of.items()}


def make_data(args: argparse.Namespace, out: Path, count: int, device: torch.device, split: str = "train") -> None:
    """Clips of the data set at the study's size, encoded; those that are there already are left."""
    options = {"count": count, "size": args.size, "frame_num": args.frame_num, "split": split, "offset": OFFSET}
    changes = {
        "checkpoint": str(args.ckpt_dir),
        "out": str(out),
        "options": options,
        "clips_per_shard": min(256, count),
        "batch": 8,
        "workers": args.workers,
        "vae_dtype": "float16" if device.type == "cuda" else "float32",
    }
    settings = PrepareSettings.from_dict(merge_settings(read_settings(PREPARE), changes))
    source = open_dataset(settings.dataset, settings.options)
    vae_dtype = getattr(torch, settings.vae_dtype)
    checkpoint = open_components(settings.checkpoint, components=settings.components)
    done = prepare(source, settings, Encoder(checkpoint, device, vae_dtype, settings.whole_clips))
    log.info("%d clips in %s", done.clips, out)
