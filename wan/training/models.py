"""What a run trains, what teaches it, and how both are spread over processes."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nabla import InputError, NablaConfig
from nabla.config import is_count, is_number
from wan.attention.compile import compile_blocks
from wan.models.attention import apply_attention
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.family import WAN
from wan.models.wan.geometry import GEOMETRY
from wan.parallel.fsdp import apply_fsdp, is_sharded
from wan.training.config import LoraSettings, OptimizerSettings, TrainingSettings
from wan.training.muon import Muon

log = logging.getLogger("wan")

# As `init_weights` of the published program has it (wan/modules/model.py).
EMBEDDING_STD = 0.02
TEXT_LENGTH = "text_len"
# diffusers' defaults for them are those of the 14B.
SIZES = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "text_dim")
OTHER_SIZES = ("freq_dim", "in_channels", "out_channels", "rope_max_seq_len")
CHANNELS = 16
# Sinusoids come in pairs, and each of the three axes of a video has one at least.
LEAST_EVEN = {"attention_head_dim": 6, "freq_dim": 2}
# Of what else diffusers' class takes, all that makes Wan2.1 from text.
FIXED = {"patch_size": GEOMETRY.patch, "qk_norm": "rms_norm_across_heads"}
FIXED |= dict.fromkeys(("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"))


def open_components(name: str | Path, transformer: Mapping[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of which a VAE, text encoder and tokenizer are used: it may be a folder without a transformer.

    transformer: the sizes of a new one, whose `text_len` goes before the checkpoint's
    """
    folder = Path(name).expanduser()
    if (folder / "vae").is_dir() and not (folder / "transformer" / "config.json").is_file():
        # Such a folder is told by its VAE, since a checkpoint is recognised by its transformer.
        checkpoint = Checkpoint(str(folder.resolve()), folder.resolve(), published=False, config={}, family=WAN)
    else:
        checkpoint = Checkpoint.open(name)
    if not transformer:
        return checkpoint
    config = {key: value for key, value in checkpoint.config.items() if key != TEXT_LENGTH}
    config |= {key: value for key, value in transformer.items() if key == TEXT_LENGTH}
    if not is_count(config.get(TEXT_LENGTH, 1)) or not config.get(TEXT_LENGTH, 1):
        raise InputError(f"transformer: {TEXT_LENGTH} {config[TEXT_LENGTH]!r} is not a positive integer; 512 is Wan's")
    return replace(checkpoint, config=config)


def warn_of_another_attention(base: Checkpoint, attention: NablaConfig) -> None:
    """Say so if a checkpoint was made for another attention than it will be trained with."""
    own = base.own_attention()
    if own is not None and own.algorithm != attention.algorithm:
        line = "warning: checkpoint %s was made for %s; training with %s as asked"
        log.warning(line, base.name, own.algorithm, attention.algorithm)


def build_student(
    settings: TrainingSettings, base: Checkpoint, device: torch.device, mesh: DeviceMesh | None
) -> WanTransformer3DModel:
    """The transformer that a run trains, its weights float32; sharded over a mesh, if there is one.

    Of LoRA the weights beneath are in the run's precision, unless they are sharded, which takes parameters of one type.
    """
    # The same in every process: fully_shard keeps a process's own rows of what it has, and sends nothing.
    torch.manual_seed(settings.seed)
    if settings.transformer is not None:
        transformer = new_transformer(settings.transformer, device)
    else:
        frozen = settings.lora is not None and mesh is None
        dtype = getattr(torch, settings.precision) if frozen else torch.float32
        # Adapters have to be there before their blocks are sharded.
        shard = _sharding(mesh) if settings.lora is None else None
        # Sharded while it is still without weights, so that each process reads its own rows alone.
        transformer = components.load_transformer(components.transformer_component(base), dtype, device, shard)
    transformer.train().requires_grad_(settings.lora is None)
    _embed_time_in_float32(transformer)
    if settings.lora is not None:
        add_lora(transformer, settings.lora)
    if mesh is not None and not is_sharded(transformer):
        apply_fsdp(transformer, transformer.blocks, mesh)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    # Replaces each block's `forward` alone, so that FSDP's hooks, which run around it, stay out of the graph.
    if settings.compile:
        compile_blocks(transformer.blocks, trains=True)
    apply_attention(transformer, settings.attention)
    if not settings.attention.is_dense:
        applied = transformer.nabla
        # Makes the tensors that layers write their shares into, for the metrics' `kept`.
        applied.measure_density(applied.sparse, device)
    return transformer


def build_teacher(
    settings: TrainingSettings, base: Checkpoint, device: torch.device, mesh: DeviceMesh | None
) -> WanTransformer3DModel:
    """The dense transformer of `distill`, frozen, in the run's precision; sharded over a mesh, if there is one."""
    component, dtype = components.transformer_component(base), getattr(torch, settings.precision)
    teacher = components.load_transformer(component, dtype, device, _sharding(mesh))
    _embed_time_in_float32(teacher)
    if settings.compile:
        compile_blocks(teacher.blocks)
    return teacher


def _embed_time_in_float32(transformer: WanTransformer3DModel) -> None:
    """As inference has it, whatever autocast would do."""
    embedder = transformer.condition_embedder.time_embedder
    embedder.forward = torch.autocast(transformer.device.type, enabled=False)(embedder.forward)


def _sharding(mesh: DeviceMesh | None) -> Callable[[nn.Module], None] | None:
    return None if mesh is None else lambda model: apply_fsdp(model, model.blocks, mesh)


@contextmanager
def no_gradient_sync(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Backward without telling other processes the gradients: more will be added to them."""
    # DDP's way is a context manager of accelerate's, FSDP2's a flag of the model.
    if not is_sharded(model):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def matrix_parameters(transformer: WanTransformer3DModel) -> list[nn.Parameter]:
    """The weights of the blocks' linear layers: attention and feed-forward, without embeddings and modulation."""
    return [module.weight for module in transformer.blocks.modules() if isinstance(module, nn.Linear)]


def build_optimizers(
    own: OptimizerSettings,
    steps: int,
    weights: list[nn.Parameter],
    matrices: list[nn.Parameter],
    matrix_lr: float | None,
) -> tuple[list[Optimizer], list[LRScheduler]]:
    """AdamW, and before it, unless `matrix_lr` is None, Muon for the matrices among the weights; each with a schedule.

    Both have the weight decay, the warmup and the course of the learning rate that the settings say.
    """
    optimizers: list[Optimizer] = []
    if matrix_lr is not None:
        # Before AdamW, which has to stay the last: `TrainState` names schedules and reports the rate by that.
        optimizers.append(Muon(matrices, matrix_lr, weight_decay=own.weight_decay))
        # By identity, since `in` would compare tensors number by number.
        apart = set(map(id, matrices))
        weights = [weight for weight in weights if id(weight) not in apart]
    # Fewer passes over weights and averages.
    fused = weights[0].device.type == "cuda"
    optimizers.append(AdamW(weights, own.lr, own.betas, own.eps, own.weight_decay, fused=fused))
    # diffusers' "constant" has no warmup; with 0 steps of it both are the same.
    name = "constant_with_warmup" if own.schedule == "constant" else own.schedule
    lengths = {"num_warmup_steps": own.warmup, "num_training_steps": steps}
    return optimizers, [get_scheduler(name, optimizer, **lengths) for optimizer in optimizers]


def new_transformer(sizes: dict[str, Any], device: torch.device) -> WanTransformer3DModel:
    """A transformer with the weights that Wan2.1's training begins with, drawn from torch's global generator.

    sizes: keys of diffusers' `WanTransformer3DModel`, and `text_len`, how many rows of text states it is to see
    Raises `InputError` for others, for sizes that make no transformer, and if one of `SIZES` is missing.
    """
    _check_sizes(sizes)
    try:
        transformer = WanTransformer3DModel(**{key: value for key, value in sizes.items() if key != TEXT_LENGTH})
    except (TypeError, ValueError) as error:
        raise InputError(f"transformer: {error}; its keys are those of diffusers' WanTransformer3DModel") from None
    # Drawn on the CPU, so that a seed gives the same weights on every device. Xavier for linear layers, normal ones for
    # the embeddings' and zeros for the last layer, which so predicts 0 at first, as the published program begins.
    for module in transformer.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            # A convolution here is the linear layer of a patch.
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedder = transformer.condition_embedder
    for embedding in (embedder.text_embedder, embedder.time_embedder):
        for layer in (embedding.linear_1, embedding.linear_2):
            nn.init.normal_(layer.weight, std=EMBEDDING_STD)
    nn.init.zeros_(transformer.proj_out.weight)
    transformer.to(device)
    components.finish_transformer(transformer, device)
    return transformer


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    if missing := [name for name in SIZES if name not in sizes]:
        raise InputError(f"transformer: {missing[0]} is missing; give {', '.join(SIZES)}")
    for name in (*SIZES, *OTHER_SIZES):
        if name in sizes and (not is_count(sizes[name]) or sizes[name] == 0):
            raise InputError(f"transformer: {name} {sizes[name]!r} is not a positive integer")
    for name, least in LEAST_EVEN.items():
        if name in sizes and (sizes[name] % 2 or sizes[name] < least):
            raise InputError(f"transformer: {name} {sizes[name]} is not an even number of at least {least}")
    channels = [sizes.get(name, CHANNELS) for name in ("in_channels", "out_channels")]
    if channels[0] != channels[1]:
        raise InputError(
            f"transformer: out_channels {channels[1]} must be in_channels, {channels[0]}; {CHANNELS} is usual"
        )
    if "eps" in sizes and not (is_number(sizes["eps"]) and sizes["eps"] > 0):
        raise InputError(f"transformer: eps {sizes['eps']!r} is not a positive number; 1e-6 is usual")
    for name, only in FIXED.items():
        given = sizes.get(name, only)
        if (tuple(given) if isinstance(given, list) else given) != only:
            raise InputError(f"transformer: {name} {given!r} must be {only}, as in Wan2.1; leave it out")


def add_lora(transformer: WanTransformer3DModel, settings: LoraSettings) -> None:
    """Put trainable float32 adapters on a frozen transformer; raises `InputError` if peft or a target is missing."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("LoRA needs peft; install it with pip install peft")
    from peft import LoraConfig

    targets = list(settings.targets)
    for target in targets:
        named = [module for name, module in transformer.named_modules() if name.endswith(f".{target}")]
        if not named or not all(isinstance(module, nn.Linear) for module in named):
            raise InputError(f"lora target {target!r} names no linear layers alone; to_q, to_k, to_v are usual")
    transformer.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets))
    # diffusers' add_adapter leaves them in the type of the weights beneath, where small steps would be rounded away.
    cast_training_params(transformer, torch.float32)
