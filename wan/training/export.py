"""What was trained, as folders that generate.py takes (diffusers' layout) and as LoRA files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from wan.checkpoints.component_files import DIFFUSERS_STEM
from wan.config.attention_settings import attention_to_dict
from wan.files.atomic import atomic_path, remove
from wan.models.checkpoint import DEFAULTS_FILE, Checkpoint
from wan.models.training import TrainingFacts, training_of
from wan.training.config import TrainingSettings
from wan.training.schema import merge_settings, to_plain


def provide_components(base: Checkpoint, parts: Sequence[str], folder: Path, anew: bool) -> None:
    """Components of a checkpoint in diffusers' layout, such as its VAE: links to such, else copies.

    anew: in place of those that are there, which may be another checkpoint's
    """
    training = base.family.load_training()
    for name in parts:
        if anew:
            remove(folder / name)
        # A link that leads nowhere does not exist, and is made anew.
        elif (folder / name).exists():
            continue
        with atomic_path(folder / name) as partial:
            if not base.published:
                # Not to links in the checkpoint of another run, which that run removes when it has later ones.
                partial.symlink_to((base.folder / name).resolve())
            else:
                training.write_part(base, name, partial)


def full_state_dict(transformer: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """The weights, gathered from all processes to the memory of the first; the others get none where sharded."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return get_model_state_dict(transformer, options=options)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    base: Checkpoint,
    facts: TrainingFacts,
    state: dict[str, Tensor],
    parts_folder: Path,
    defaults: Mapping[str, Any],
) -> None:
    """A checkpoint in diffusers' layout of a transformer's weights, and links to its other components.

    config: the transformer's; base: the checkpoint that it was trained beside, and what `facts` are of
    defaults: the settings of sampling and attention that generate.py takes from it
    """
    training, own = base.family.load_training(), folder / facts.transformer
    own.mkdir(parents=True)
    # As safetensors wants them.
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, own / f"{DIFFUSERS_STEM}.safetensors", {"format": "pt"})
    config = training.own_config(config, base, defaults.get("attention", {}).get("algorithm"))
    (own / "config.json").write_text(json.dumps(config, indent=2))
    for name in facts.parts:
        # Relative, so that a run's folder can be moved.
        (folder / name).symlink_to(os.path.relpath(parts_folder / name, folder))
    (folder / DEFAULTS_FILE).write_text(yaml.safe_dump(dict(defaults), allow_unicode=True, sort_keys=False))
    # It tells the layout, so a folder without it is no checkpoint.
    training.write_index(folder, base, defaults)


def checkpoint_defaults(settings: TrainingSettings, base: Checkpoint) -> dict[str, Any]:
    """The defaults for generate.py of what is trained: the checkpoint's, under those that the run's settings give."""
    defaults = dict(base.settings_layers[0])
    defaults.pop("attention", None)
    if not settings.attention.is_dense:
        # Which backend is the best is a matter of the machine that samples.
        attention = attention_to_dict(settings.attention)
        defaults["attention"] = {key: value for key, value in attention.items() if key != "backend"}
    if settings.samples is not None:
        for name in ("sampling", "video"):
            given = {key: value for key, value in getattr(settings.samples, name).items() if key != "seed"}
            defaults = merge_settings(defaults, {name: given})
    return to_plain(defaults)


def write_lora(folder: Path, transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """A LoRA file in diffusers' format, its rank and alpha included; state: the adapters' weights."""
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(transformer, state_dict=state)
    training_of(transformer).write_lora(folder, layers, transformer.peft_config["default"].to_dict())


def merged_lora_state_dict(base: Checkpoint, expert: str | None, lora: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint's transformer with a LoRA file added to them, in float32 on the CPU.

    expert: of two, the one that it is for
    """
    # A bfloat16 model would get its factors rounded to bfloat16 before they are added.
    training = base.family.load_training()
    transformer = training.load(training.component(base, expert), torch.float32, "cpu", None)
    transformer.load_lora_adapter(lora, use_safetensors=True)
    transformer.fuse_lora()
    transformer.unload_lora()
    return transformer.state_dict()


def write_weights(
    folder: Path,
    transformer: nn.Module,
    state: dict[str, Tensor],
    base: Checkpoint,
    facts: TrainingFacts,
    settings: TrainingSettings,
    provided: Path,
    is_last: bool,
) -> None:
    """Write a run's weights as generate.py takes them: a checkpoint, and of LoRA the adapter too.

    state: of all of the transformer, or of the adapter alone; provided: where the run's other components are
    is_last: of LoRA, merged weights are written at the end alone
    """
    if settings.lora is not None:
        write_lora(folder / "lora", transformer, state)
        if not is_last:
            return
        # In a folder that generate.py takes without the checkpoint beneath.
        state = merged_lora_state_dict(base, settings.expert, folder / "lora")
    write_checkpoint(folder, transformer.config, base, facts, state, provided, checkpoint_defaults(settings, base))
