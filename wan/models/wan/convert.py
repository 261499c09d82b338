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
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import yaml
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from nabla import InputError
from wan.checkpoints.component import Component
from wan.checkpoints.component_files import DIFFUSERS_STEM, TRANSFORMERS_STEM
from wan.checkpoints.file_errors import CheckpointError, read_json_object
from wan.checkpoints.locate import INDEX
from wan.checkpoints.saving import save_json, save_pickle, save_shards
from wan.config.settings import attention_config
from wan.files.atomic import atomic_path
from wan.models.checkpoint import DEFAULTS_FILE, Checkpoint
from wan.models.wan import components, published
from wan.models.wan.components import TIED
from wan.models.wan.diffusers_layout import SCHEDULER_FILE, cast, make_scheduler, write_component, write_index
from wan.models.wan.family import WAN
from wan.models.wan.latent_statistics import STATISTICS, fold_statistics
from wan.models.wan.layout import OWN_KEYS, TEXT_ENCODER_FILE, TEXT_LENGTH, TOKENIZER_FOLDER
from wan.models.wan.vae_component import vae_of_tensors

LAYOUTS = ("published", "diffusers")
# What two models of the same tensors may differ in without computing anything else.
NO_MATTER = {*STATISTICS, "decoder_base_dim", "dropout"}
# What a text encoder computes beyond its tensors.
TEXT_SETTINGS = ("relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj")

T = TypeVar("T")


class ConvertedModels(NamedTuple, Generic[T]):
    """A checkpoint's three models: the files of each as a `Component`, or each on the meta device."""

    transformer: T
    vae: T
    text_encoder: T


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
    The transformer, VAE, text encoder, tokenizer, attention and defaults of generate.py are carried. Returns a line for
    each thing of the checkpoint that is not.
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
    if sparse_algorithm is not None:
        checkpoint = replace(checkpoint, config=checkpoint.config | {"sparse_algo": sparse_algorithm})
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out} is there already; choose a new directory, so that nothing is written over")
    models = ConvertedModels(
        components.transformer_component(checkpoint),
        components.vae_component(checkpoint),
        # The type tells what is kept in float32 while it loads; here tensors pass as they are stored.
        components.text_encoder_component(checkpoint, torch.float32),
    )
    # Loaded to be checked, copied file by file.
    tokenizer = components.load_tokenizer(checkpoint, models.text_encoder.model.config.vocab_size)
    constants = _check_published(checkpoint, models).vae.config if layout == "published" else None
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
    models: ConvertedModels[Component],
    constants: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    config = published.transformer_config(models.transformer.model, checkpoint.text_length)
    if "sparse_algo" in checkpoint.config:
        config["sparse_algo"] = checkpoint.config["sparse_algo"]
    save_json(config, folder / "config.json")
    transformer = cast(models.transformer.tensors(), dtype)
    save_shards(_renamed(models.transformer.model, transformer), folder, DIFFUSERS_STEM)
    # A pickle is written in one call, so that the text encoder is held as a whole, as is the VAE.
    text_encoder = dict(models.text_encoder.tensors())
    if not torch.equal(text_encoder.pop(TIED, text_encoder["shared.weight"]), text_encoder["shared.weight"]):
        raise CheckpointError(
            f"{models.text_encoder.weights.files[0].parent}: {TIED!r} and 'shared.weight' differ, "
            "and the published layout holds one table of tokens"
        )
    text_encoder = cast(text_encoder.items(), dtype)
    save_pickle(dict(_renamed(models.text_encoder.model, text_encoder)), folder / TEXT_ENCODER_FILE)
    # Folded as stored, and cast after that: what is folded is float32 at least, see `fold_statistics`.
    vae, own = dict(models.vae.tensors()), models.vae.model.config
    if any(list(own[name]) != list(constants[name]) for name in STATISTICS):
        vae |= fold_statistics(vae, own, constants)
    file = next(one.published for one in checkpoint.component_files if one.name == "vae")
    save_pickle(dict(_renamed(models.vae.model, cast(vae.items(), dtype))), folder / file)


def _renamed(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    rename = published.tensor_name(model)
    return ((rename(name), tensor) for name, tensor in tensors)


def _write_diffusers(
    checkpoint: Checkpoint, models: ConvertedModels[Component], folder: Path, dtype: torch.dtype | None
) -> None:
    also = {key: checkpoint.config[key] for key in OWN_KEYS if key in checkpoint.config}
    if also.get("text_len") == TEXT_LENGTH:
        del also["text_len"]
    write_component(models.transformer, folder / "transformer", DIFFUSERS_STEM, also, dtype)
    write_component(models.vae, folder / "vae", DIFFUSERS_STEM, dtype=dtype)
    write_component(models.text_encoder, folder / "text_encoder", TRANSFORMERS_STEM, dtype=dtype)
    write_index(folder, checkpoint.settings_layers[0], checkpoint.layout)


def _check_published(checkpoint: Checkpoint, models: ConvertedModels[Component]) -> ConvertedModels[nn.Module]:
    """The models that the published layout is read as; raises `CheckpointError` unless they compute the same."""
    config = published.transformer_config(models.transformer.model, checkpoint.text_length)
    try:
        read = ConvertedModels(
            published.transformer(config, _published_shapes(models.transformer)),
            vae_of_tensors(_published_shapes(models.vae)),
            published.text_encoder(_published_shapes(models.text_encoder)),
        )
    except (LookupError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        raise CheckpointError(f"{checkpoint.name} has no place in the published layout: {reason}") from None
    # What the published layout cannot state has to be what its program assumes.
    for component, model in zip(models, read):
        understood = _computes(model)
        for key, value in _computes(component.model).items():
            if value != understood.get(key):
                raise CheckpointError(
                    f"{component.weights.files[0].parent}: {key} is {value!r}, "
                    f"but the published layout cannot say so and means {understood.get(key)!r}"
                )
    channels, known = models.vae.model.config.z_dim, len(read.vae.config.latents_mean)
    if channels != known:
        raise CheckpointError(
            f"{models.vae.weights.files[0].parent}: z_dim is {channels}, "
            f"but the published layout has the statistics of {known} channels"
        )
    return read


def _published_shapes(component: Component) -> dict[str, tuple[int, ...]]:
    rename = published.tensor_name(component.model)
    return {rename(name): tuple(tensor.shape) for name, tensor in component.model.state_dict().items()}


def _computes(model: nn.Module) -> dict[str, Any]:
    """What makes two models of the same tensors compute the same, and what these tensors are."""
    if isinstance(model, UMT5EncoderModel):
        settings = {key: getattr(model.config, key) for key in TEXT_SETTINGS}
    else:
        settings = {k: v for k, v in model.config.items() if not k.startswith("_") and k not in NO_MATTER}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return settings | {f"the shape of {name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _left_behind(checkpoint: Checkpoint, models: ConvertedModels[Component]) -> list[str]:
    """A line for each thing of a checkpoint that a conversion does not carry."""
    lines = []
    carried = {"config.json", INDEX, DEFAULTS_FILE}
    carried |= {
        file.relative_to(checkpoint.folder).parts[0] for component in models for file in component.weights.files
    }
    carried.add(checkpoint.tokenizer_folder.relative_to(checkpoint.folder).parts[0])
    scheduler, known = checkpoint.folder / SCHEDULER_FILE, make_scheduler(checkpoint.settings_layers[0]).config
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
