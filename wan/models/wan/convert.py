"""A checkpoint rewritten in another layout or dtype, tensor by tensor; nothing is dropped in silence.

The published layout has no place for the statistics of a VAE's latents: they are constants of its programs. They are
folded into the VAE's outer 1x1x1 convolutions instead, see `wan.models.wan.latent_statistics`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import CLIPVisionModel, UMT5EncoderModel

from nabla import InputError
from wan.checkpoints.component import Component
from wan.checkpoints.file_errors import CheckpointError, read_json_object
from wan.checkpoints.locate import CONFIG, INDEX
from wan.checkpoints.saving import save_json, save_pickle, save_shards
from wan.checkpoints.weights import WeightFiles
from wan.config.attention_settings import attention_config
from wan.files.atomic import atomic_path
from wan.models.checkpoint import DEFAULTS_FILE, Checkpoint
from wan.models.wan import components, published
from wan.models.wan.components import TIED
from wan.models.wan.diffusers_layout import SCHEDULER_FILE, cast, make_scheduler, write_component, write_index
from wan.models.wan.family import WAN
from wan.models.wan.image_encoder import (
    config_of_tensors,
    image_encoder_component,
    is_not_needed,
    published_shapes,
    published_tensors,
)
from wan.models.wan.kinds import kind_of
from wan.models.wan.latent_statistics import STATISTICS, fold_statistics
from wan.models.wan.layout import (
    EXPERT_FILES,
    IMAGE_ENCODER,
    OWN_KEYS,
    TASK_FILE,
    TEXT_LENGTH,
    TOKENIZER_FOLDER,
    write_task,
)
from wan.models.wan.vae_component import vae_of_tensors

LAYOUTS = ("published", "diffusers")
TRANSFORMERS = tuple(files.name for files in EXPERT_FILES)
# What two models of the same tensors may differ in without computing anything else.
NO_MATTER = {*STATISTICS, "decoder_base_dim", "dropout"}
# What a text encoder, and what sees pictures, compute beyond their tensors.
TEXT_SETTINGS = ("relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj")
TOWER_SETTINGS = ("num_attention_heads", "image_size", "patch_size", "hidden_act", "layer_norm_eps")


def convert(
    checkpoint: Checkpoint,
    out: Path,
    layout: str,
    dtype: torch.dtype | None = None,
    sparse_algorithm: str | None = None,
) -> list[str]:
    """Write a checkpoint to the new folder `out` in a layout, one of `LAYOUTS`; whole, or nothing of it.

    dtype: of the weights; as they are stored if None
    sparse_algorithm: the attention that it is to run with where nothing says else; its own if None
    The transformers, VAE, text encoder, what sees pictures, tokenizer, attention and defaults of generate.py are
    carried. Returns a line for each thing of the checkpoint that is not.
    Raises `CheckpointError` for a checkpoint that is damaged, or says what the other layout cannot, and `InputError`
    if there is nothing to change, `out` is not free or the algorithm not understood.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is not known; use one of {', '.join(LAYOUTS)}")
    if checkpoint.family is not WAN:
        raise InputError(
            f"{checkpoint.name} is of {checkpoint.family.name}, which is not converted and need not be: either layout "
            "is read as it is; give it as --ckpt_dir"
        )
    if checkpoint.published == (layout == "published") and dtype is None and sparse_algorithm is None:
        raise InputError(f"{checkpoint.name} is in the {layout} layout already; give another, a dtype or an attention")
    defaults = _defaults(checkpoint, sparse_algorithm)
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out} is there already; choose a new directory, so that nothing is written over")
    models = _components(checkpoint)
    if sparse_algorithm is not None:
        checkpoint = replace(checkpoint, config=checkpoint.config | {"sparse_algo": sparse_algorithm})
    # Loaded to be checked, copied file by file.
    tokenizer = components.load_tokenizer(checkpoint, models["text_encoder"].model.config.vocab_size)
    constants = _check_published(checkpoint, models)["vae"].config if layout == "published" else None
    not_carried = _left_behind(checkpoint, models)
    # A name such as "." has no folder beside it to write to.
    with atomic_path(Path(os.path.abspath(out))) as partial:
        partial.mkdir()
        if constants is not None:
            _write_published(checkpoint, models, constants, partial, dtype)
        else:
            _write_diffusers(checkpoint, models, partial, dtype)
        if tokenizer is not None:
            folder = TOKENIZER_FOLDER if layout == "published" else "tokenizer"
            shutil.copytree(checkpoint.tokenizer_folder, partial / folder)
        if defaults is not None:
            (partial / DEFAULTS_FILE).write_text(defaults, encoding="utf-8")
    return not_carried


def _components(checkpoint: Checkpoint) -> dict[str, Component]:
    """The models of a checkpoint and their files, by the names that diffusers' layout has for them."""
    kind = kind_of(checkpoint.layout)
    transformers = [components.transformer_component(checkpoint, expert=one) for one in kind.experts or (None,)]
    models = dict(zip(TRANSFORMERS, transformers))
    models["vae"] = components.vae_component(checkpoint)
    # The type tells what is kept in float32 while it loads; here tensors pass as they are stored.
    models["text_encoder"] = components.text_encoder_component(checkpoint, torch.float32)
    if kind.sees_pictures:
        models[IMAGE_ENCODER.name] = image_encoder_component(checkpoint)
    return models


def _defaults(checkpoint: Checkpoint, sparse_algorithm: str | None) -> str | None:
    """The text of a checkpoint's defaults file, as it stands, or with another attention than it names; None without."""
    file = checkpoint.folder / DEFAULTS_FILE
    defaults = checkpoint.settings_layers[0]
    if sparse_algorithm is not None:
        attention = defaults.get("attention", {}) | {"algorithm": sparse_algorithm}
        attention_config(attention)
        if "attention" in defaults:
            return yaml.safe_dump(defaults | {"attention": attention}, allow_unicode=True, sort_keys=False)
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _write_published(
    checkpoint: Checkpoint,
    models: Mapping[str, Component],
    constants: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    files = {one.name: folder / one.published for one in checkpoint.component_files}
    kind = kind_of(checkpoint.layout)
    if kind.experts:
        write_task(kind.name, folder)
    for name, component in models.items():
        file = files[name]
        if name in TRANSFORMERS:
            file.parent.mkdir(exist_ok=True)
            save_json(_published_config(checkpoint, component), file.parent / CONFIG)
            save_shards(_renamed(component.model, cast(component.tensors(), dtype)), file.parent, file.name)
        elif name == IMAGE_ENCODER.name:
            save_pickle(dict(cast(published_tensors(component).items(), dtype)), file)
        else:
            # A pickle is written in one call, so that a model is held as a whole.
            tensors = _vae_tensors(component, constants) if name == "vae" else _text_tensors(component)
            save_pickle(dict(_renamed(component.model, cast(tensors.items(), dtype))), file)


def _published_config(checkpoint: Checkpoint, transformer: Component) -> dict[str, Any]:
    model_type = kind_of(checkpoint.layout).model_type
    config = published.transformer_config(transformer.model, checkpoint.text_length, model_type)
    own = checkpoint.config
    return config | ({"sparse_algo": own["sparse_algo"]} if "sparse_algo" in own else {})


def _text_tensors(component: Component) -> dict[str, Tensor]:
    tensors = dict(component.tensors())
    if not torch.equal(tensors.pop(TIED, tensors["shared.weight"]), tensors["shared.weight"]):
        raise CheckpointError(
            f"{component.weights.files[0].parent}: {TIED!r} and 'shared.weight' differ, "
            "and the published layout holds one table of tokens"
        )
    return tensors


def _vae_tensors(component: Component, constants: Mapping[str, Any]) -> dict[str, Tensor]:
    # Folded as stored, and cast after that: what is folded is float32 at least, see `fold_statistics`.
    tensors, own = dict(component.tensors()), component.model.config
    if any(list(own[name]) != list(constants[name]) for name in STATISTICS):
        tensors |= fold_statistics(tensors, own, constants)
    return tensors


def _renamed(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    rename = published.tensor_name(model)
    return ((rename(name), tensor) for name, tensor in tensors)


def _write_diffusers(
    checkpoint: Checkpoint, models: Mapping[str, Component], folder: Path, dtype: torch.dtype | None
) -> None:
    also = {key: checkpoint.config[key] for key in OWN_KEYS if key in checkpoint.config}
    if also.get("text_len") == TEXT_LENGTH:
        del also["text_len"]
    stems = {one.name: one.stem for one in checkpoint.component_files}
    for name, component in models.items():
        write_component(component, folder / name, stems[name], also if name in TRANSFORMERS else None, dtype)
    write_index(folder, _sampled_as(checkpoint), checkpoint.layout)


def _sampled_as(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"sampling": {"shift": checkpoint.own_sampling().shift}}


def _check_published(checkpoint: Checkpoint, models: Mapping[str, Component]) -> dict[str, nn.Module]:
    """The models that the published layout is read as; raises `CheckpointError` unless they compute the same."""
    kind = kind_of(checkpoint.layout)
    if checkpoint.boundary != kind.boundary:
        raise CheckpointError(
            f"{checkpoint.name}: boundary_ratio is {checkpoint.boundary}, but the published layout cannot say so and "
            f"means {kind.boundary}"
        )
    try:
        read = {name: _read_published(checkpoint, name, component) for name, component in models.items()}
    except (LookupError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        raise CheckpointError(f"{checkpoint.name} has no place in the published layout: {reason}") from None
    # What the published layout cannot state has to be what its program assumes.
    for name, component in models.items():
        understood = _computes(read[name])
        for key, value in _computes(component.model).items():
            if value != understood.get(key):
                raise CheckpointError(
                    f"{component.weights.files[0].parent}: {key} is {value!r}, "
                    f"but the published layout cannot say so and means {understood.get(key)!r}"
                )
    channels, known = models["vae"].model.config.z_dim, len(read["vae"].config.latents_mean)
    if channels != known:
        raise CheckpointError(
            f"{models['vae'].weights.files[0].parent}: z_dim is {channels}, "
            f"but the published layout has the statistics of {known} channels"
        )
    return read


def _read_published(checkpoint: Checkpoint, name: str, component: Component) -> nn.Module:
    if name == IMAGE_ENCODER.name:
        with torch.device("meta"):
            return CLIPVisionModel(config_of_tensors(published_shapes(component.model)))
    shapes = _published_shapes(component)
    if name in TRANSFORMERS:
        return published.transformer(_published_config(checkpoint, component), shapes)
    return vae_of_tensors(shapes) if name == "vae" else published.text_encoder(shapes)


def _published_shapes(component: Component) -> dict[str, tuple[int, ...]]:
    rename = published.tensor_name(component.model)
    return {rename(name): tuple(tensor.shape) for name, tensor in component.model.state_dict().items()}


def _computes(model: nn.Module) -> dict[str, Any]:
    """What makes two models of the same tensors compute the same, and what these tensors are."""
    if isinstance(model, (UMT5EncoderModel, CLIPVisionModel)):
        keys = TEXT_SETTINGS if isinstance(model, UMT5EncoderModel) else TOWER_SETTINGS
        settings = {key: getattr(model.config, key) for key in keys}
    else:
        settings = {k: v for k, v in model.config.items() if not k.startswith("_") and k not in NO_MATTER}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return settings | {f"the shape of {name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _left_behind(checkpoint: Checkpoint, models: Mapping[str, Component]) -> list[str]:
    """A line for each thing of a checkpoint that a conversion does not carry."""
    lines = []
    # What prepares pictures is a constant of either program.
    carried = {CONFIG, INDEX, DEFAULTS_FILE, TASK_FILE, "image_processor"}
    weights = {name: component.weights for name, component in models.items()}
    carried |= {file.relative_to(checkpoint.folder).parts[0] for one in weights.values() for file in one.files}
    if IMAGE_ENCODER.name in weights and any(map(is_not_needed, WeightFiles(weights[IMAGE_ENCODER.name].files).shapes)):
        lines.append("not carried over: of CLIP, what compares pictures with texts, which no video is made with")
    carried.add(checkpoint.tokenizer_folder.relative_to(checkpoint.folder).parts[0])
    scheduler, known = checkpoint.folder / SCHEDULER_FILE, make_scheduler(_sampled_as(checkpoint)).config
    # One that says no more than the defaults do is no loss.
    if scheduler.is_file() and all(
        known.get(k) == v for k, v in read_json_object(scheduler).items() if not k.startswith("_")
    ):
        carried.add(scheduler.parent.name)
    if not (checkpoint.tokenizer_folder / "tokenizer.json").is_file():
        lines.append("the checkpoint has no tokenizer, so neither has the copy, and neither can read prompts")
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name not in carried and not path.name.startswith(".") and not path.name.endswith(".index.json"):
            lines.append(f"not carried over: {path.name}")
    if checkpoint.published:
        unknown = checkpoint.config.keys() - published.CONFIG_KEYS
        lines += [f"not carried over: {key} of config.json" for key in sorted(unknown) if not key.startswith("_")]
    return lines
