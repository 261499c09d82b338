"""The VAE of a checkpoint, Wan2.1's or Wan2.2's, in either layout: read off its tensors or checked against them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from nabla.checks import is_count, is_number
from wan.checkpoints.component import Component, fitting
from wan.checkpoints.config_checks import MAX_LAYERS, MAX_WIDTH, check_layers, each, numbers, positive, sizes_of
from wan.checkpoints.file_errors import CheckpointError, read_json_object
from wan.checkpoints.locate import CONFIG
from wan.checkpoints.weights import WeightFiles
from wan.models.checkpoint import Checkpoint
from wan.models.wan.latent_statistics import STATISTICS, WAN22
from wan.models.wan.vae_names import published_name

Shapes = Mapping[str, tuple[int, ...]]
COLOURS = 3
FIRST_RESIDUAL = re.compile(r"encoder\.down_blocks\.\d+\.conv1\.weight")
SIZES = ("base_dim", "decoder_base_dim", "z_dim", "in_channels", "out_channels", "patch_size")
# Of Wan2.2's on the hub: whether pictures are clamped, which diffusers' class does whatever this says.
NO_LONGER_READ = ("clip_output",)


def vae_component(checkpoint: Checkpoint) -> Component:
    """The VAE; without statistics of its latents in its configuration it has the published ones."""
    weights = checkpoint.weights_of("vae")
    config = None if checkpoint.published else read_json_object(checkpoint.folder / "vae" / CONFIG)
    component = read_vae(weights, config)
    own, (frames, rows, _) = component.model.config, checkpoint.geometry.vae_stride
    if (own.scale_factor_temporal, own.scale_factor_spatial) != (frames, rows):
        raise CheckpointError(
            f"{weights.where}: the VAE takes {own.scale_factor_temporal} frames and {own.scale_factor_spatial} pixels "
            f"to one latent, but this checkpoint's transformer {frames} and {rows}; use the VAE that came with it"
        )
    channels = checkpoint.config.get("out_dim" if checkpoint.published else "out_channels")
    # What is no size is found when the transformer is made.
    if is_count(channels) and channels != own.z_dim:
        raise CheckpointError(
            f"{weights.where}: the VAE's z_dim is {own.z_dim}, but this checkpoint's transformer makes latents of "
            f"{channels} channels; use the VAE that came with it"
        )
    return component


def read_vae(weights: WeightFiles, config: Mapping[str, Any] | None) -> Component:
    """The VAE of files, in diffusers' layout by its configuration; None: in the published layout, which has none.

    Raises `CheckpointError` unless both fit each other, and `AutoencoderKLWan`.
    """
    where = weights.files[0].parent
    with fitting(AutoencoderKLWan.__name__, weights):
        if config is None:
            model = vae_of_tensors(weights.shapes)
        else:
            check_vae(config, weights.shapes)
            left_out = [key for key in config if key.startswith("_") or key in NO_LONGER_READ]
            with torch.device("meta"):
                model = AutoencoderKLWan(**{key: value for key, value in config.items() if key not in left_out})
        _check_strides(model.config)
    for name in STATISTICS:
        values = model.config[name]
        if (
            not isinstance(values, (list, tuple))
            or len(values) != model.config.z_dim
            or not all(map(is_number, values))
        ):
            raise CheckpointError(f"{where}: the VAE's {name} is {values!r}, but must be {model.config.z_dim} numbers")
    if min(model.config.latents_std) <= 0:
        raise CheckpointError(f"{where}: the VAE's latents_std is {model.config.latents_std}, but must be above 0")
    rename = published_name(model) if config is None else str
    return Component(model, weights, {rename(name): name for name in model.state_dict()})


def vae_of_tensors(shapes: Shapes) -> AutoencoderKLWan:
    """The VAE of published tensors of these shapes, on the meta device, and the statistics of its latents' program.

    Raises `ValueError` or `LookupError` for tensors of no such VAE.
    """
    nested = any(name.startswith("encoder.downsamples.0.downsamples.") for name in shapes)
    stages = _nested_stages(shapes) if nested else _numbered_stages(shapes)
    base, channels = shapes["encoder.conv1.weight"][:2]
    # Pictures are cut into squares of so many pixels, whose colours are channels.
    patch = math.isqrt(channels // COLOURS)
    halves = [f"{last}.time_conv.weight" in shapes for _, last in stages[:-1]]
    own = {
        "base_dim": base,
        "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
        "z_dim": shapes["conv2.weight"][0],
        # The width of a stage is that of its last residual block, whose last convolution is `residual.6`.
        "dim_mult": [shapes[f"{residuals[-1]}.residual.6.weight"][0] // base for residuals, _ in stages],
        "num_res_blocks": len(stages[0][0]),
        "temperal_downsample": halves,
    }
    if nested:
        own |= {"is_residual": True, "in_channels": channels, "out_channels": shapes["decoder.head.2.weight"][0]}
        own |= {"patch_size": patch, "scale_factor_spatial": patch * 2 ** len(halves)} | WAN22
    with torch.device("meta"):
        return AutoencoderKLWan(**own)


# Of a stage of the encoder: its residual blocks, and what comes last and changes the size in all stages but the last.
Stage = tuple[list[str], str]


def _numbered_stages(shapes: Shapes) -> list[Stage]:
    """Of Wan2.1: one list of residual blocks, and one `resample` between stages."""
    count = numbers(shapes, "encoder.downsamples.")
    resamples = [n for n in range(count) if f"encoder.downsamples.{n}.resample.1.weight" in shapes]
    # As many residual blocks in each stage as before the first `resample`, which all stages but the last have.
    if not resamples or count != (len(resamples) + 1) * (resamples[0] + 1) - 1:
        raise ValueError(f"its encoder has {count} blocks, of which {resamples} change the size; stages differ")
    blocks = [f"encoder.downsamples.{n}" for n in range(count)]
    ends, residuals = [*resamples, count], resamples[0]
    return [(blocks[end - residuals : end], blocks[min(end, count - 1)]) for end in ends]


def _nested_stages(shapes: Shapes) -> list[Stage]:
    """Of Wan2.2: each stage is a list of its own."""
    stages: list[Stage] = []
    count = numbers(shapes, "encoder.downsamples.")
    for stage in range(count):
        inside = f"encoder.downsamples.{stage}.downsamples."
        blocks = [f"{inside}{n}" for n in range(numbers(shapes, inside))]
        residuals = blocks if stage == count - 1 else blocks[:-1]
        if not residuals or (stages and len(residuals) != len(stages[0][0])):
            raise ValueError(f"its encoder's stage {stage} has {len(residuals)} residual blocks; stages differ")
        stages.append((residuals, blocks[-1]))
    return stages


def check_vae(config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise `ValueError` for a configuration of `AutoencoderKLWan` that is not of tensors of these shapes."""
    sizes_of({key: value for key, value in config.items() if value is not None}, SIZES)
    if "num_res_blocks" in config:
        positive("num_res_blocks", config["num_res_blocks"], MAX_LAYERS)
    stages = config.get("dim_mult", [1, 2, 4, 4])
    each("dim_mult", stages, lambda value: is_count(value) and 0 < value <= MAX_WIDTH, None, "positive integers")
    each("attn_scales", config.get("attn_scales", []), is_number, None, "numbers")
    halves = config.get("temperal_downsample", [False, True, True])
    each("temperal_downsample", halves, lambda value: isinstance(value, bool), len(stages) - 1, "booleans")
    if not is_number(config.get("dropout", 0.0)) or not 0 <= config.get("dropout", 0.0) < 1:
        raise ValueError(f"dropout is {config['dropout']!r}, but must be a number of at least 0 and below 1")
    nested = config.get("is_residual", False)
    if not isinstance(nested, bool):
        raise ValueError(f"is_residual is {nested!r}, but must be true or false")
    residuals = config.get("num_res_blocks", 2)
    if nested:
        check_layers("dim_mult", len(stages), numbers(shapes, "encoder.down_blocks."))
        check_layers("num_res_blocks", residuals, numbers(shapes, "encoder.down_blocks.0.resnets."))
        return
    # Wan2.1's encoder lists its blocks one after the other, and only residual ones have a `conv1`.
    there = sum(1 for name in shapes if FIRST_RESIDUAL.fullmatch(name))
    if (said := len(stages) * residuals) != there:
        raise ValueError(f"dim_mult and num_res_blocks say {said} residual blocks of the encoder, its files {there}")


def _check_strides(own: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a model's strides, which it does not compute with, are those that it has."""
    patch = own["patch_size"] or 1
    made = 2 ** sum(own["temperal_downsample"]), patch * 2 ** (len(own["dim_mult"]) - 1)
    said = own["scale_factor_temporal"], own["scale_factor_spatial"]
    if said != made:
        raise ValueError(f"scale_factor_temporal and scale_factor_spatial are {said}, but its stages make {made}")
    for key in ("in_channels", "out_channels"):
        if own[key] != COLOURS * patch**2:
            raise ValueError(
                f"{key} is {own[key]}, but {COLOURS} colours in patches of {patch} are {COLOURS * patch**2}"
            )
