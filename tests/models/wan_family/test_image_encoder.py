"""CLIP's picture tower: what the published program sees of a picture, from either layout, without the text tower."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import DATA, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file

from wan.checkpoints import weights as weight_files
from wan.checkpoints.component_files import TRANSFORMERS_STEM
from wan.checkpoints.file_errors import CheckpointError
from wan.checkpoints.saving import save_pickle
from wan.checkpoints.weights import WeightFiles
from wan.models.wan.image_encoder import (
    PREFIX,
    clip_pixels,
    config_of_tensors,
    image_states,
    load_image_encoder,
    published_tensors,
    read_image_encoder,
)
from wan.models.wan.layout import IMAGE_ENCODER_FILE

PICTURES = {"i2v-nano": ("image",), "flf2v-nano": ("first_frame", "last_frame")}
SINGLE = f"{TRANSFORMERS_STEM}.safetensors"
FILE = DATA / "i2v-nano" / "checkpoint" / IMAGE_ENCODER_FILE


@pytest.fixture
def published():
    return read_image_encoder(WeightFiles([FILE]), None)


@pytest.fixture
def saved(published, tmp_path):
    """The folder of the tower in diffusers' layout, as the installed transformers writes it."""
    load_image_encoder(published, "cpu").save_pretrained(tmp_path / "image_encoder")
    return tmp_path / "image_encoder"


def read(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    return read_image_encoder(WeightFiles.find(folder, TRANSFORMERS_STEM), config)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_seen_as_the_published_program_sees_them(name):
    exact = load_file(DATA / name / "expected.safetensors")
    component = read_image_encoder(WeightFiles([DATA / name / "checkpoint" / IMAGE_ENCODER_FILE]), None)
    encoder = load_image_encoder(component, "cpu")
    pictures = [Image.open(DATA / name / "inputs" / f"{one}.png").convert("RGB") for one in PICTURES[name]]
    pixels = torch.cat([clip_pixels(np.asarray(one), encoder.config.image_size) for one in pictures])
    assert relative_error(pixels, exact["cond.clip.pixels"]) < 1e-5
    states = image_states(encoder, pixels)
    assert states.shape == exact["cond.clip"].shape and relative_error(states, exact["cond.clip"]) < 1e-5


def test_the_published_sizes_and_names_are_understood():
    keys = json.loads((DATA / "wan_family_keys.json").read_text())["clip xlm-roberta vit-h-14"]["keys"]
    config = config_of_tensors({name: tuple(shape) for name, shape in keys.items()})
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (1280, 16, 5120)
    assert (config.image_size, config.patch_size, config.hidden_act, config.layer_norm_eps) == (224, 14, "gelu", 1e-5)


def test_published_tensors_come_back_to_the_bit(published):
    visual = {
        name: tensor for name, tensor in WeightFiles([FILE]) if name.startswith("visual.") and name != "visual.head"
    }
    made = published_tensors(published)
    assert made.keys() == visual.keys()
    for name, tensor in visual.items():
        assert made[name].dtype == tensor.dtype and torch.equal(made[name], tensor), name


def test_the_text_tower_is_not_read(published, monkeypatch):
    seen, opened = [], weight_files.open_tensors

    class Spy:
        def __init__(self, file):
            self.opened = opened(file)

        def __enter__(self):
            shapes, read = self.opened.__enter__()
            return shapes, lambda name: seen.append(name) or read(name)

        def __exit__(self, *failure):
            return self.opened.__exit__(*failure)

    monkeypatch.setattr(weight_files, "open_tensors", Spy)
    load_image_encoder(published, "cpu")
    assert len(seen) == 7 + 12 * published.model.config.num_hidden_layers
    assert all(name.startswith("visual.") and name != "visual.head" for name in seen)
    assert published.bytes(torch.float32) == 4 * sum(x.numel() for x in published.model.parameters())


@pytest.mark.parametrize("prefix", ("", PREFIX))
def test_names_with_and_without_a_prefix_are_read(published, saved, prefix):
    tensors = {prefix + name.removeprefix(PREFIX): x for name, x in load_file(saved / SINGLE).items()}
    # Of files that older libraries wrote.
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, saved / SINGLE)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        image_states(load_image_encoder(read(saved), "cpu"), pixels),
        image_states(load_image_encoder(published, "cpu"), pixels),
    )


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but its files hold 2 layers"),
        ({"num_attention_heads": 3}, "multiple of"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"image_size": 70}, "must be"),
        ({"image_size": 57}, "image_size is 57, which is no multiple of patch_size"),
        ({"hidden_size": 80}, "must be"),
        ({"intermediate_size": "many"}, "intermediate_size is 'many', but must be a positive integer"),
        ({"layer_norm_eps": 2}, "layer_norm_eps is 2"),
        ({"model_type": "siglip_vision_model"}, "model_type is 'siglip_vision_model'"),
    ),
)
def test_a_configuration_that_is_not_of_its_tensors_is_refused(saved, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(saved, **changes)


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda t: t.pop("visual.transformer.1.attn.to_qkv.bias"), r"to_qkv.bias\[k\]' is missing"),
        (lambda t: t.pop("visual.pos_embedding"), "KeyError"),
        (lambda t: t.update({"visual.more": torch.ones(1)}), "tensor 'visual.more' does not belong"),
        (
            lambda t: t.update({"visual.transformer.0.attn.to_qkv.bias": torch.ones(481)}),
            r"to_qkv.bias' is \(481,\), but must be \(480,\)",
        ),
        (lambda t: t.update({"visual.pos_embedding": torch.ones(1, 16, 160)}), "it has 16 positions"),
        (lambda t: t.update({"visual.patch_embedding.weight": torch.ones(120, 3, 14, 14)}), "no multiple"),
    ),
)
def test_a_published_file_of_other_tensors_is_refused(tmp_path, change, message):
    tensors = dict(WeightFiles([FILE]))
    change(tensors)
    save_pickle(tensors, tmp_path / IMAGE_ENCODER_FILE)
    with pytest.raises(CheckpointError, match=message):
        read_image_encoder(WeightFiles([tmp_path / IMAGE_ENCODER_FILE]), None)


def test_a_truncated_file_is_refused(tmp_path):
    shutil.copy(FILE, tmp_path)
    file = tmp_path / IMAGE_ENCODER_FILE
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_image_encoder(WeightFiles([file]), None)
