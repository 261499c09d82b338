"""Checkpoints of all of Wan's kinds in diffusers' layout and back: the same tensors to the bit, the same kind."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from wan import Checkpoint, CheckpointError
from wan.models.wan import random_checkpoint
from wan.models.wan.convert import convert
from wan.models.wan.kinds import KINDS
from wan.models.wan.random_sizes import MODELS

NANO = [name for name in MODELS if name.endswith("-nano")]


@pytest.fixture(scope="module", params=NANO)
def layouts(request, tmp_path_factory):
    """A model, its checkpoint as published, in diffusers' layout, and as published again."""
    folder = tmp_path_factory.mktemp(request.param)
    random_checkpoint.write(request.param, folder / "published", torch.bfloat16, "nabla-0.7")
    assert convert(Checkpoint.open(folder / "published"), folder / "diffusers", "diffusers") == []
    assert convert(Checkpoint.open(folder / "diffusers"), folder / "again", "published") == []
    return request.param, *(folder / name for name in ("published", "diffusers", "again"))


def test_there_and_back_is_the_same_to_the_bit(layouts):
    model, first, _, again = layouts
    names = [sorted(file.relative_to(folder) for file in folder.rglob("*")) for folder in (first, again)]
    assert names[0] == names[1]
    checkpoint = Checkpoint.open(first)
    for files in checkpoint.component_files:
        before, after = (dict(files.find(folder, True)) for folder in (first, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(before[name].dtype == after[name].dtype for name in before)
    for file in first.rglob("config*.json"):
        assert json.loads(file.read_text()) == json.loads((again / file.relative_to(first)).read_text())


def test_diffusers_layout_says_the_same_kind(layouts):
    model, first, diffusers, _ = layouts
    checkpoint, kind = Checkpoint.open(diffusers), KINDS[MODELS[model].kind]
    assert not checkpoint.published and checkpoint.layout._replace(config={}) == (False, {}, kind.name, kind.boundary)
    assert checkpoint.own_algorithm == Checkpoint.open(first).own_algorithm
    index = json.loads((diffusers / "model_index.json").read_text())
    assert index["_class_name"] == kind.diffusers_pipeline
    assert index.get("boundary_ratio") == kind.boundary and bool(index.get("expand_timesteps")) == (model[:4] == "ti2v")
    folders = {files.name for files in checkpoint.component_files}
    assert folders <= {path.name for path in diffusers.iterdir()} and folders <= index.keys()


def test_diffusers_reads_the_whole_pipeline(layouts):
    model, _, diffusers, _ = layouts
    kind = KINDS[MODELS[model].kind]
    pipe = DiffusionPipeline.from_pretrained(diffusers)
    assert type(pipe).__name__ == kind.diffusers_pipeline
    assert type(pipe.transformer).__name__ == ("WanVACE" if kind.name == "vace" else "Wan") + "Transformer3DModel"
    assert (getattr(pipe, "transformer_2", None) is not None) == bool(kind.experts)
    assert pipe.scheduler.config.flow_shift == Checkpoint.open(diffusers).own_sampling().shift
    if kind.sees_pictures:
        # As large as its tower sees them.
        assert pipe.encode_image(Image.new("RGB", (90, 50)), "cpu").shape[0] == 1


def test_a_boundary_of_its_own_has_no_place_in_the_published_layout(tmp_path):
    random_checkpoint.write("t2v-A14B-nano", tmp_path / "published", torch.bfloat16)
    convert(Checkpoint.open(tmp_path / "published"), tmp_path / "diffusers", "diffusers")
    file = tmp_path / "diffusers" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"boundary_ratio": 0.5}))
    assert Checkpoint.open(tmp_path / "diffusers").boundary == 0.5
    with pytest.raises(CheckpointError, match="boundary_ratio is 0.5, but .* means 0.875"):
        convert(Checkpoint.open(tmp_path / "diffusers"), tmp_path / "again", "published")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"boundary_ratio": 2}))
    with pytest.raises(CheckpointError, match="boundary_ratio is 2, not a number between 0 and 1"):
        Checkpoint.open(tmp_path / "diffusers")
