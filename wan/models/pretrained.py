"""From a checkpoint to a pipeline: its models loaded, and what changes how the transformer runs put on, in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nabla import NablaConfig
from wan.attention.apply import apply_attention
from wan.attention.compile import check_compiler, compile_blocks
from wan.checkpoints.file_errors import CheckpointError
from wan.config.cache_settings import CacheSettings
from wan.config.model_settings import LoraFile
from wan.config.settings import Settings
from wan.memory.options import LoadOptions
from wan.memory.planner import MemoryPlan
from wan.models.checkpoint import Checkpoint
from wan.parallel.distributed import DistributedContext
from wan.parallel.sequence_parallel import apply_sequence_parallel
from wan.sampling.finite import check_vae

log = logging.getLogger("wan")


def from_pretrained(
    path: str | Path | Checkpoint,
    attention: NablaConfig | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    offload: bool | None = None,
    t5_cpu: bool = False,
    compile: bool | None = None,
    fp8: bool | None = None,
    vae_dtype: torch.dtype | None = None,
    processes: DistributedContext | None = None,
    dit_fsdp: bool = False,
    t5_fsdp: bool = False,
    transformer: str | Path | Mapping[str, str] | None = None,
    lora: Sequence[str | LoraFile] | None = None,
    cache: CacheSettings | str | None = None,
    plan: MemoryPlan | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    text_encoder_2: str | Path | None = None,
    expand_prompt: bool = False,
    pipeline: type[Any] | None = None,
) -> Any:
    """Load a checkpoint of any family: a directory or hub id, in the published or diffusers' layout.

    Returns its family's pipeline: `WanT2V`, `Kandinsky5`.

    What is None is what the checkpoint's `defaults.yaml` says, and where it says nothing what stands here.

    attention: a config or its string; None takes the one that the checkpoint names, and dense if it names none
    dtype: of the transformer and the text encoder, float32 by default; the VAE's encoder, and CLIP, are float32
    vae, text_encoder, text_encoder_2: directories or hub ids of these, where they are not the checkpoint's own
    fp8: run the transformer's linear layers in float8, see `wan.quantize.float8`; off by default
    vae_dtype: of the VAE's decoder; by default float16 on a GPU beside a half-precision transformer, else float32
    transformer: a file of weights in place of the checkpoint's transformer, see `wan.checkpoints.single_file`; or, by
        "high" and "low", of its experts
    lora: files, or `file:scale`, merged into the transformer's weights, see `wan.checkpoints.lora`; none by default.
        `high:file:scale` goes into that expert alone, a plain one into both
    cache: reuse what blocks computed in earlier steps, as `kind:threshold` says, see `wan.config.cache_settings`;
        "none", the default, is off
    processes: share the work as they are laid out
    expand_prompt: also load what writes prompts out, for `pipe.expand_prompt` and `generate(..., expand_prompt=True)`
    pipeline: the class that is wanted, the checkpoint's own or one made from it
    For the rest see `wan.memory.options.LoadOptions`. Raises `CheckpointError` for a checkpoint that cannot be had, is
    incomplete or is damaged, and `InputError` for settings that are not allowed or cannot run here, whoever names them.
    """
    given = {"vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    components = {name: str(where) for name, where in given.items() if where is not None}
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path, transformer, components)
    checkpoint.family.require(expand_prompt=expand_prompt)
    made = _pipeline_class(checkpoint, pipeline)
    asked = components | {
        "dtype": dtype and str(dtype).removeprefix("torch."),
        "vae_dtype": vae_dtype and str(vae_dtype).removeprefix("torch."),
        "fp8": fp8,
        "transformer": transformer if isinstance(transformer, Mapping) else transformer and str(transformer),
        "lora": lora,
        "cache": cache,
        # Whatever the checkpoint names is not looked at then.
        "attention": None if attention is None else {"algorithm": "dense"},
    }
    settings = checkpoint.resolve(asked, needs_prompt=False)
    if attention is None:
        log.info("attention of the checkpoint: %s", settings.attention.algorithm)
    else:
        attention = NablaConfig.parse(attention) if isinstance(attention, str) else attention
        settings = replace(settings, model=replace(settings.model, attention=attention))
    options = LoadOptions(
        torch.device(device),
        offload,
        t5_cpu,
        compile,
        processes,
        dit_fsdp=dit_fsdp,
        t5_fsdp=t5_fsdp,
        expand_prompt=expand_prompt,
        # Of a checkpoint whose videos may begin with a picture.
        expand_pictures=expand_prompt and checkpoint.begins_with_picture(settings.model.kind) is not False,
        plan=plan,
    )
    return made.from_settings(checkpoint, settings, options)


def _pipeline_class(checkpoint: Checkpoint, wanted: type[Any] | None) -> type[Any]:
    """The class that is wanted, or the checkpoint's own; raises `CheckpointError` for one that does not run it."""
    own = checkpoint.family.load_pipeline(checkpoint.layout)
    if wanted is None:
        return own
    # Of a user's class the one that it is made from. Ours for other kinds may be made from this one too.
    ours = next((one for one in wanted.__mro__ if one.__module__.startswith(f"{__package__}.")), None)
    if ours is not own:
        raise CheckpointError(
            f"{checkpoint.name} is {checkpoint.kind or 'a checkpoint'} of {checkpoint.family.name}, which "
            f"{wanted.__name__} does not run; use wan.{own.__name__}, or wan.from_pretrained for any"
        )
    return wanted


def from_settings(cls: type[Any], checkpoint: Checkpoint, settings: Settings, options: LoadOptions) -> Any:
    """A class method of pipelines, which have `load_models`.

    Load a checkpoint as settings say that `Checkpoint.resolve` gave, which knows the checkpoint's own.

    Raises as `from_pretrained` does.
    """
    if options.compiles:
        check_compiler(options.device)
    if settings.cache is not None:
        cls.transformer_spec.check_cache(settings.cache.kind)
    models = cls.load_models(checkpoint, settings.model, options)
    pipe: Any = cls(
        **models._asdict(),
        device=options.device,
        text_length=checkpoint.text_length,
        sampling=settings.sampling,
        video=settings.video,
        processes=options.distributed,
    )
    pipe.plan, pipe.lora = options.plan, settings.lora
    if pipe.vae is not None:
        check_vae(pipe.vae, checkpoint.folder)
    _put_on(pipe, settings, options.compiles)
    return pipe


def _put_on(pipe: Any, settings: Settings, compiled: bool) -> None:
    """What changes how transformers run, each over what was put on before.

    Compiling comes first, so that what a cache puts around a block's forward stays outside of its graph. Attention
    comes last, since it asks what splits the sequence.
    """
    spec = pipe.transformer_spec
    if compiled:
        # Of one code, so that the graph of the first transformer's blocks serves all.
        compile_blocks(block for one in pipe.transformers for block in spec.blocks_of(one))
    if settings.cache is not None:
        # Only where one is asked for: step caches stand on private names of diffusers, which it may take away.
        from wan.caches.apply import apply_cache

        for one in pipe.transformers:
            apply_cache(one, settings.cache, spec)
    if pipe.distributed is not None and pipe.distributed.layout.ulysses > 1:
        for one in pipe.transformers:
            apply_sequence_parallel(one, pipe.distributed.ulysses_mesh, spec)
    apply_attention(pipe.transformers, settings.attention, spec)
