"""What was seen of a generation, as records: plain objects of JSON, the same in a log and in a report."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nabla import NablaConfig, probe
from wan.observe.profiler import BLOCK, Example, Seen, Span

if TYPE_CHECKING:
    from wan.config.settings import SamplingSettings
    from wan.models.wan.pipeline import WanT2V

Record = dict[str, Any]

DIGITS = 6
PARTS = {"mask_ms": probe.MASK, "attention_ms": probe.ATTENTION, "block_ms": BLOCK}
MEASURED = {
    "kept": "share of key blocks that a head keeps, averaged over query blocks and over the forwards of the step; of "
    "all heads, those on other processes too; 1 where a layer is dense, null where it did not run; of a step, the mean "
    "of the layers that ran, and of the run, that of these of all steps",
    "layers_run": "how many layers ran in any forward of the step; a cache leaves out the others",
    "blocks": "chosen in a forward of the step, or taken over from an earlier step in all of them; null where no "
    "sparse layer ran",
    "ms": "of the step: between events on the GPU, or by the clock on a CPU; compiling and moving of weights included",
    "block_ms": "of the layer's whole block, summed over the forwards of the step that the leading process ran",
    "mask_ms": "choosing blocks from pooled tokens and listing them, without the pooling; summed like block_ms, of the "
    "leading process's own heads; null where nothing is chosen, or inside a compiled graph where none can look",
    "attention_ms": "the sparse kernel alone, summed like mask_ms; null where attention is dense, or inside a compiled "
    "graph where none can look",
    "memory": "of the leading process: held when the step had been asked for, and the most since the program began",
}


def header(pipe: WanT2V, sampling: SamplingSettings, latents: Tensor, about: Record) -> Record:
    """The first record: what runs."""
    applied, config = getattr(pipe.transformer, "nabla", None), pipe.transformer.config
    own = applied.config if applied else NablaConfig()
    return {
        "kind": "run",
        **about,
        "solver": sampling.solver,
        "steps": sampling.steps,
        "shift": sampling.shift,
        "guide_scale": sampling.guide_scale,
        "attention": own.algorithm,
        "window": None if own.window is None else list(own.window),
        "tile": list(own.tile),
        "dense_steps": own.dense_steps,
        "dense_layers": list(own.dense_layers),
        "mask_refresh": own.mask_refresh,
        "cache": None if pipe.cache is None else pipe.cache.settings.describe(),
        "layers": len(pipe.transformer.blocks),
        "heads": config.num_attention_heads,
        "grid": [n // p for n, p in zip(latents.shape[2:], config.patch_size)],
        "device": _device_name(pipe.device),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "processes": 1 if pipe.distributed is None else pipe.distributed.layout.processes_per_video,
        "measured": MEASURED,
    }


def of_step(seen: Seen, timed: bool) -> list[Record]:
    """A record for each layer of a step, and the step's own, which is the last; the device must be done with it."""
    kept = kept_shares(seen)
    times = _times(seen.spans)
    layers = []
    for layer, (shares, kernel) in enumerate(zip(kept, seen.kernels)):
        ran = not np.isnan(shares).all()
        spread = {"mean": rounded(shares.mean()), "min": rounded(shares.min()), "max": rounded(shares.max())}
        record = {"kind": "layer", "step": seen.step, "layer": layer, "kept": spread if ran else None, "kernel": kernel}
        if timed:
            record |= {name: rounded(times.get((layer, part))) for name, part in PARTS.items()}
        layers.append(record)
    means = [record["kept"]["mean"] for record in layers if record["kept"]]
    step = {
        "kind": "step",
        "step": seen.step,
        "kept": rounded(sum(means) / len(means)) if means else None,
        "layers_run": len(means),
        "blocks": _origin(seen),
        "forwards": len(seen.forwards),
        "ms": rounded(seen.start.milliseconds_to(seen.end)),
        "memory": {name: rounded(amount) for name, amount in seen.memory.items()},
    }
    return [*layers, step]


def stages(seconds: dict[str, float], records: Iterable[Record]) -> Record:
    """The last record: what each stage took, and the share that was kept in the mean over the layers of all steps."""
    kept = [record["kept"]["mean"] for record in records if record["kind"] == "layer" and record["kept"]]
    taken = {name: round(value, 3) for name, value in seconds.items()}
    return {"kind": "stages", "seconds": taken, "kept": rounded(sum(kept) / len(kept)) if kept else None}


def kept_shares(seen: Seen) -> np.ndarray:
    """Shares (layers, heads) in the mean over the forwards of a step; nan for a layer that ran in none of them."""
    shares = (torch.stack(seen.forwards) if seen.kept is None else seen.kept).double().numpy()
    ran = (shares > 0).sum(axis=0)
    return np.where(ran, shares.sum(axis=0) / np.maximum(ran, 1), np.nan)


def examples_of(seen: Seen) -> list[Example]:
    """Of each layer that was looked at, the head that keeps least and the one that keeps most."""
    found: dict[int, list[Example]] = {}
    for look in seen.looks:
        for index, share, blocks in zip(look.heads.tolist(), look.shares.tolist(), look.blocks.numpy()):
            head = look.before + index
            number = None if look.alike else head if look.own is None else int(look.own[head])
            found.setdefault(look.layer, []).append(Example(seen.step, look.layer, number, rounded(share), blocks))
    chosen = []
    for examples in found.values():
        least, most = (choose(examples, key=lambda one: one.share) for choose in (min, max))
        chosen += [least] if least.head == most.head else [least, most]
    return chosen


def _origin(seen: Seen) -> str | None:
    """Where the blocks came from that the step's forwards attended to."""
    if not seen.took_over:
        return None
    return "taken over" if all(seen.took_over) else "chosen"


def rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), DIGITS)


def _times(spans: list[Span]) -> dict[tuple[int, str], float]:
    """Milliseconds by layer and part."""
    times: dict[tuple[int, str], float] = {}
    for span in spans:
        key = span.layer, span.part
        times[key] = times.get(key, 0.0) + span.start.milliseconds_to(span.end)
    return times


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}"
