"""What was seen of a generation, as events: plain objects of JSON, the same in a log and in a report."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nabla import NablaConfig, probe
from wan.attention.apply import applied_attention
from wan.observe.step_trace import BLOCK, MaskExample, Span, StepTrace

if TYPE_CHECKING:
    from wan.config.settings import SamplingSettings
    from wan.observe.observer import ObservedPipeline

Event = dict[str, Any]

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


def run_event(pipe: ObservedPipeline, sampling: SamplingSettings, latents: Tensor, about: Event) -> Event:
    """The first event: what runs."""
    transformer, spec, applied = pipe.transformer, pipe.transformer_spec, applied_attention(pipe.transformer)
    own, layers = applied.config if applied else NablaConfig(), len(spec.blocks_of(transformer))
    return {
        "kind": "run",
        **about,
        "solver": sampling.solver,
        "steps": sampling.steps,
        "shift": sampling.shift,
        "guide_scale": sampling.plain_guide_scale,
        "attention": own.algorithm,
        "window": None if own.window is None else list(own.window),
        "tile": list(own.tile),
        "dense_steps": own.dense_step_count(sampling.steps),
        "dense_layers": list(own.dense_layer_numbers(layers)),
        "profile": own.profile and own.profile.to_dict(),
        "mask_refresh": own.mask_refresh,
        "cache": None if pipe.cache is None else pipe.cache.settings.describe(),
        "layers": layers,
        "heads": spec.heads(transformer),
        "grid": list(spec.grid(transformer, tuple(latents.shape[2:]))),
        "device": _device_name(pipe.device),
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "processes": 1 if pipe.distributed is None else pipe.distributed.layout.processes_per_video,
        "measured": MEASURED,
    }


def step_events(trace: StepTrace, timed: bool) -> list[Event]:
    """An event for each layer of a step, and the step's own, which is the last; the device must be done with it."""
    densities = head_densities(trace)
    times = _times(trace.spans)
    layers: list[Event] = []
    for layer, (by_head, kernel) in enumerate(zip(densities, trace.kernels)):
        ran = not np.isnan(by_head).all()
        spread = {"mean": rounded(by_head.mean()), "min": rounded(by_head.min()), "max": rounded(by_head.max())}
        event: Event = {
            "kind": "layer",
            "step": trace.step,
            "layer": layer,
            "kept": spread if ran else None,
            "kernel": kernel,
        }
        if timed:
            event |= {name: rounded(times.get((layer, part))) for name, part in PARTS.items()}
        layers.append(event)
    means = [event["kept"]["mean"] for event in layers if event["kept"]]
    step = {
        "kind": "step",
        "step": trace.step,
        **({} if trace.expert is None else {"expert": trace.expert}),
        "kept": rounded(sum(means) / len(means)) if means else None,
        "layers_run": len(means),
        "blocks": _origin(trace),
        "forwards": len(trace.densities),
        "ms": rounded(trace.milliseconds()),
        "memory": {name: rounded(amount) for name, amount in trace.memory.items()},
    }
    return [*layers, step]


def stages_event(seconds: dict[str, float], events: Iterable[Event]) -> Event:
    """The last event: what each stage took, and the share that was kept in the mean over the layers of all steps."""
    kept = [event["kept"]["mean"] for event in events if event["kind"] == "layer" and event["kept"]]
    taken = {name: round(value, 3) for name, value in seconds.items()}
    return {"kind": "stages", "seconds": taken, "kept": rounded(sum(kept) / len(kept)) if kept else None}


def head_densities(trace: StepTrace) -> np.ndarray:
    """Densities (layers, heads) in the mean over the forwards of a step; nan for a layer that ran in none of them."""
    # (forwards, layers, heads), or 1 for heads where all layers are dense; forwards of other processes among them.
    by_forward = torch.stack(trace.densities) if trace.host_densities is None else trace.host_densities
    densities = by_forward.double().numpy()
    # No head keeps nothing, so a zero says that the layer did not run in that forward.
    ran = (densities > 0).sum(axis=0)
    return np.where(ran, densities.sum(axis=0) / np.maximum(ran, 1), np.nan)


def mask_examples(trace: StepTrace) -> list[MaskExample]:
    """Of each layer that was looked at, the head that keeps least and the one that keeps most."""
    found: dict[int, list[MaskExample]] = {}
    for sample in trace.mask_samples:
        for index, density, blocks in zip(sample.heads.tolist(), sample.densities.tolist(), sample.blocks.numpy()):
            head = sample.before + index
            # Where processes share the heads, from this one's numbering to that of the layer.
            number = None if sample.alike else head if sample.own is None else int(sample.own[head])
            found.setdefault(sample.layer, []).append(
                MaskExample(trace.step, sample.layer, number, round(density, DIGITS), blocks)
            )
    chosen = []
    for examples in found.values():
        least, most = (choose(examples, key=lambda one: one.density) for choose in (min, max))
        chosen += [least] if least.head == most.head else [least, most]
    return chosen


def _origin(trace: StepTrace) -> str | None:
    """Where the blocks came from that the step's forwards attended to."""
    if not trace.reused_masks:
        return None
    return "taken over" if all(trace.reused_masks) else "chosen"


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
