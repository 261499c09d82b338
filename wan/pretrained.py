"""From a checkpoint to a pipeline: its models loaded, and what changes how the transformer runs put on, in order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nabla import NablaConfig
from wan.attention import apply_attention, compile_blocks
from wan.cache_settings import CacheSettings
from wan.checkpoint import Checkpoint
from wan.config import LoraFile
from wan.loading import load_models
from wan.parallel import apply_sequence
from wan.planner import Plan
from wan.processes import Processes
from wan.step_cache import apply_cache

if TYPE_CHECKING:
    from wan.pipeline import WanT2V

log = logging.getLogger("wan")


def from_pretrained(
    cls: type[WanT2V],
    path: str | Path | Checkpoint,
    attention: NablaConfig | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    offload: bool | None = None,
    t5_cpu: bool = False,
    compile: bool | None = None,
    fp8: bool = False,
    vae_dtype: torch.dtype | None = None,
    processes: Processes | None = None,
    dit_fsdp: bool = False,
    t5_fsdp: bool = False,
    transformer: str | Path | None = None,
    lora: Sequence[str | LoraFile] = (),
    cache: CacheSettings | str | None = None,
    plan: Plan | None = None,
) -> WanT2V:
    """Load a checkpoint: a directory or hub id, in the published or diffusers' layout.

    attention: a config or its string; None takes the one that the checkpoint names, and dense if it names none
    dtype: of the transformer and the text encoder; the VAE's encoder is float32
    offload: keep each component in host memory while it is idle; None decides by the size of the GPU
    t5_cpu: run the text encoder on the CPU
    compile: compile the transformer's blocks; None does so on a GPU. Every new size of video compiles anew
    fp8: run the transformer's linear layers in float8, see `wan.fp8`
    vae_dtype: of the VAE's decoder; None means float16 on a GPU beside a half-precision transformer, else float32
    processes: share the work as they are laid out
    dit_fsdp, t5_fsdp: shard the transformer, the text encoder over the processes that share a video
    transformer: a file of weights in place of the checkpoint's transformer, see `wan.single_file`
    lora: files, or `file:scale`, merged into the transformer's weights, see `wan.lora`
    cache: reuse what blocks computed in earlier steps, as `kind:threshold` says, see `wan.cache_settings`
    plan: where the models lie and how their weights are packed, in place of offload, t5_cpu and fp8; see
        `wan.budget.plan_run`
    Raises `CheckpointError` for a checkpoint that cannot be had, is incomplete or is damaged.
    """
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path, transformer is None)
    device = torch.device(device)
    if isinstance(attention, str):
        attention = NablaConfig.parse(attention)
    asked = {} if attention is None else {"attention": {"algorithm": "dense"}}
    defaults = checkpoint.resolve(asked, {"prompt": "none"})
    if attention is None:
        attention = defaults.attention
        log.info("attention of the checkpoint: %s", attention.algorithm)
    models = load_models(
        checkpoint,
        device,
        dtype,
        vae_dtype,
        fp8=fp8,
        offload=offload,
        t5_cpu=t5_cpu,
        processes=processes,
        dit_fsdp=dit_fsdp,
        t5_fsdp=t5_fsdp,
        transformer_file=transformer,
        lora=[LoraFile.parse(file) for file in lora],
        plan=plan,
    )
    t5_cpu = t5_cpu if plan is None else plan.text == "cpu"
    pipe = cls(
        **models._asdict(),
        device=device,
        text_device=torch.device("cpu") if t5_cpu else device,
        text_length=checkpoint.text_length,
        sampling=defaults.sampling,
        video=defaults.video,
        processes=processes,
    )
    pipe.plan = plan
    _put_on(pipe, attention, CacheSettings.parse(cache), device.type == "cuda" if compile is None else compile)
    return pipe


def _put_on(pipe: WanT2V, attention: NablaConfig, cache: CacheSettings | None, compiled: bool) -> None:
    """What changes how the transformer runs, each over what was put on before."""
    if compiled:
        compile_blocks(pipe.transformer)
    if cache is not None:
        apply_cache(pipe.transformer, cache)
    if pipe.processes is not None and pipe.processes.layout.ulysses > 1:
        apply_sequence(pipe.transformer, pipe.processes.sequence)
    apply_attention(pipe.transformer, attention)
