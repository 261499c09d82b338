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
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nabla import InputError, NablaConfig
from nabla.checks import is_count
from wan.attention.compile import compile_blocks
from wan.checkpoints.file_errors import read_json_object
from wan.config.model_settings import EXPERTS
from wan.models.attention import apply_attention, spec_of
from wan.models.checkpoint import Checkpoint
from wan.models.family import Family
from wan.models.registry import FAMILIES, FIRST_FAMILY
from wan.models.training import TEXT_LENGTH, TrainingFacts, TrainingSpec
from wan.parallel.fsdp import apply_fsdp, is_sharded
from wan.training.config import LoraSettings, OptimizerSettings, TrainingSettings
from wan.training.muon import Muon
from wan.training.objective_settings import ALL_TIMESTEPS
from wan.training.schema import merge_settings

log = logging.getLogger("wan")


def open_components(
    name: str | Path, transformer: Mapping[str, Any] | None = None, components: Mapping[str, str] | None = None
) -> Checkpoint:
    """A checkpoint of which a VAE, text encoders and tokenizers are used: it may be a folder without a transformer.

    transformer: the sizes of a new one, whose `text_len` goes before the checkpoint's
    components: directories or hub ids of those that are taken from elsewhere, by name
    """
    folder = Path(name).expanduser()
    if not components and _lacks_transformer(folder):
        # Such a folder is told by its VAE, since a checkpoint is recognised by its transformer.
        family = _family_of_vae(folder / "vae" / "config.json")
        checkpoint = Checkpoint(str(folder.resolve()), folder.resolve(), published=False, config={}, family=family)
    else:
        checkpoint = Checkpoint.open(name, components=components)
    if not transformer:
        return checkpoint
    config = {key: value for key, value in checkpoint.config.items() if key != TEXT_LENGTH}
    config |= {key: value for key, value in transformer.items() if key == TEXT_LENGTH}
    if not is_count(config.get(TEXT_LENGTH, 1)) or not config.get(TEXT_LENGTH, 1):
        raise InputError(f"transformer: {TEXT_LENGTH} {config[TEXT_LENGTH]!r} is not a positive integer; 512 is Wan's")
    return replace(checkpoint, config=config)


def _lacks_transformer(folder: Path) -> bool:
    """Whether a folder has a VAE, and no transformer in any family's layout."""
    if not (folder / "vae").is_dir() or (folder / "transformer" / "config.json").is_file():
        return False
    return all(family.recognise(folder) is None for family in FAMILIES)


def _family_of_vae(config: Path) -> Family:
    """The family whose VAE a configuration is of; what no family knows is the first one's, which says why it fails."""
    kind = read_json_object(config).get("_class_name") if config.is_file() else None
    known = {family.load_training().vae: family for family in FAMILIES if family.training}
    return known.get(kind, FIRST_FAMILY)


def sampled_as(base: Checkpoint) -> dict[str, Any]:
    """How a checkpoint is sampled where a run does not say: what its defaults give over its family's."""
    return merge_settings(dict(base.family.defaults(base.layout)), base.settings_layers[0])


def settle(settings: TrainingSettings, base: Checkpoint) -> tuple[TrainingSettings, TrainingFacts]:
    """Settings with what a checkpoint decides where they leave it open, and what of training it decides alone.

    Of LoRA the layers that it adapts, and of an expert the timesteps at which it runs. Raises `InputError` for what
    the checkpoint cannot be trained with.
    """
    check_expert(settings, base)
    facts = base.family.load_training().facts(base, settings.expert)
    check_beginning(settings, base, facts)
    if settings.lora is not None and settings.lora.targets is None:
        settings = replace(settings, lora=replace(settings.lora, targets=facts.lora_targets))
    if base.boundary is not None:
        name = "min_timestep" if settings.expert == "high" else "max_timestep"
        if getattr(settings.objective, name) is None:
            objective = replace(settings.objective, **{name: ALL_TIMESTEPS * base.boundary})
            settings = replace(settings, objective=objective)
    return settings, facts


def check_expert(settings: TrainingSettings, base: Checkpoint) -> None:
    """Raise `InputError` unless settings name the transformer to train of a checkpoint of two, or of others none."""
    if base.boundary is None:
        if settings.expert is not None:
            raise InputError(f"expert {settings.expert!r} is none of {base.name}, of one transformer; leave it out")
        return
    if settings.expert is None:
        raise InputError(
            f"{base.name} has two transformers, of which a run trains one; set expert to {' or '.join(EXPERTS)}"
        )
    if settings.samples is not None and settings.samples.prompts:
        raise InputError(
            f"samples: a video needs both transformers of {base.name}, and a run has one; leave prompts out, and see "
            "what it wrote with generate.py"
        )


def check_beginning(settings: TrainingSettings, base: Checkpoint, facts: TrainingFacts) -> None:
    """Raise `InputError` for what settings ask of how clips, and a transformer, begin, which a checkpoint has not."""
    if settings.objective.first_frame and not facts.may_give_first:
        raise InputError(
            f"first_frame {settings.objective.first_frame} is for a transformer that takes a first frame without "
            f"noise, which that of {base.name} does not; leave it out"
        )
    if settings.transformer is not None and (facts.beside or base.boundary is not None):
        raise InputError(
            f"transformer: a new one begins from text alone, and has no other beside it, unlike that of {base.name}; "
            "leave it out"
        )


def warn_of_another_attention(base: Checkpoint, attention: NablaConfig) -> None:
    """Say so if a checkpoint was made for another attention than it will be trained with."""
    own = base.own_attention()
    if own is not None and own.algorithm != attention.algorithm:
        line = "warning: checkpoint %s was made for %s; training with %s as asked"
        log.warning(line, base.name, own.algorithm, attention.algorithm)


def build_student(
    settings: TrainingSettings, base: Checkpoint, device: torch.device, mesh: DeviceMesh | None
) -> nn.Module:
    """The transformer that a run trains, its weights float32; sharded over a mesh, if there is one.

    Of LoRA the weights beneath are in the run's precision, unless they are sharded, which takes parameters of one type.
    """
    # The same in every process: fully_shard keeps a process's own rows of what it has, and sends nothing.
    torch.manual_seed(settings.seed)
    training = base.family.load_training()
    if settings.transformer is not None:
        if training.new is None:
            raise InputError(f"transformer: a new one of {base.family.name} cannot be made; leave it out")
        transformer = training.new(settings.transformer, device)
    else:
        frozen = settings.lora is not None and mesh is None
        dtype = getattr(torch, settings.precision) if frozen else torch.float32
        # Adapters have to be there before their blocks are sharded.
        shard = _sharding(mesh) if settings.lora is None else None
        # Sharded while it is still without weights, so that each process reads its own rows alone.
        transformer = training.load(training.component(base, settings.expert), dtype, device, shard)
    transformer.train().requires_grad_(settings.lora is None)
    training.prepare(transformer)
    blocks = spec_of(transformer).blocks_of(transformer)
    if settings.lora is not None:
        add_lora(transformer, settings.lora)
    if mesh is not None and not is_sharded(transformer):
        apply_fsdp(transformer, blocks, mesh)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    # Replaces each block's `forward` alone, so that FSDP's hooks, which run around it, stay out of the graph.
    if settings.compile:
        compile_blocks(blocks, trains=True)
    apply_attention(transformer, settings.attention)
    if not settings.attention.is_dense:
        applied = transformer.nabla
        # Makes the tensors that layers write their shares into, for the metrics' `kept`.
        applied.measure_density(applied.sparse, device)
    return transformer


def build_teacher(
    settings: TrainingSettings, base: Checkpoint, device: torch.device, mesh: DeviceMesh | None
) -> nn.Module:
    """The dense transformer of `distill`, frozen, in the run's precision; sharded over a mesh, if there is one."""
    training: TrainingSpec = base.family.load_training()
    component = training.component(base, settings.expert)
    teacher = training.load(component, getattr(torch, settings.precision), device, _sharding(mesh))
    training.prepare(teacher)
    if settings.compile:
        compile_blocks(spec_of(teacher).blocks_of(teacher))
    return teacher


def _sharding(mesh: DeviceMesh | None) -> Callable[[nn.Module], None] | None:
    return None if mesh is None else lambda model: apply_fsdp(model, spec_of(model).blocks_of(model), mesh)


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


def matrix_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The weights of the blocks' linear layers: attention and feed-forward, without embeddings and modulation."""
    blocks = spec_of(transformer).blocks_of(transformer)
    # Modulations that are linear layers are among what stays in float32.
    apart = set(transformer._keep_in_fp32_modules or ())
    layers = [module for name, module in blocks.named_modules() if not apart & set(name.split("."))]
    return [layer.weight for layer in layers if isinstance(layer, nn.Linear)]


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


def add_lora(transformer: nn.Module, settings: LoraSettings) -> None:
    """Put trainable float32 adapters on `targets` of a frozen transformer.

    Raises `InputError` if peft is missing or one of the targets is.
    """
    assert settings.targets is not None, "`settle` names those that are usual"
    if importlib.util.find_spec("peft") is None:
        raise InputError("LoRA needs peft; install it with pip install peft")
    from peft import LoraConfig

    targets = list(settings.targets)
    for target in targets:
        named = [module for name, module in transformer.named_modules() if name.endswith(f".{target}")]
        if not named or not all(isinstance(module, nn.Linear) for module in named):
            raise InputError(f"lora target {target!r} names no linear layers alone; leave targets out for usual ones")
    transformer.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets))
    # diffusers' add_adapter leaves them in the type of the weights beneath, where small steps would be rounded away.
    cast_training_params(transformer, torch.float32)
