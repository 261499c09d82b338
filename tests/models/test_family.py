"""The seam: families are listed in one place, and what one says of itself decides what is made of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nabla import InputError
from wan import Checkpoint, CheckpointError, Kandinsky5, WanT2V
from wan.models import checkpoint as checkpoints
from wan.models import recognise as recognition
from wan.models.family import FEATURES, Layout, TransformerFacts
from wan.models.kandinsky.family import KANDINSKY
from wan.models.registry import FAMILIES
from wan.models.wan.family import WAN


def recognise(folder):
    file = folder / "other.json"
    return Layout(True, json.loads(file.read_text())) if file.is_file() else None


OTHER = replace(
    WAN,
    name="Other",
    recognise=recognise,
    landmarks=("other.json", "other.safetensors"),
    hub_files=replace(WAN.hub_files, configurations=("other.json",), others=("other.*",), transformer=("other.s*",)),
    tokenizers={"tokenizer": "first", "tokenizer_2": "second"},
    facts=lambda layout: TransformerFacts(layout.config["heads"], 128, 256),
    defaults=lambda layout, size=None: {"sampling": {"steps": 16, "shift": 3.0}, "video": {"fps": 24}},
    features=FEATURES - {"lora"},
)


@pytest.fixture
def two_families(monkeypatch):
    monkeypatch.setattr(recognition, "FAMILIES", (WAN, OTHER))


@pytest.fixture
def other(tmp_path, two_families):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/other.json").write_text(json.dumps({"heads": 28}))
    return tmp_path / "other"


def test_each_family_is_whole():
    assert FAMILIES == (WAN, KANDINSKY)
    assert (WAN.load_pipeline(Layout(True, {}, "t2v")), KANDINSKY.load_pipeline(Layout(True, {}))) == (
        WanT2V,
        Kandinsky5,
    )
    for family in FAMILIES:
        assert family.features <= FEATURES and family.components_of(Layout(True, {}, ""))[0].name == "transformer"
        assert family.naming.to_published(family.naming.first_weight) == family.naming.first_weight
        assert set(family.tokenizers) <= {"tokenizer", "tokenizer_2"}


def test_a_checkpoint_is_of_the_family_that_recognises_it(other, random_nano):
    assert Checkpoint.open(random_nano).family is WAN
    checkpoint = Checkpoint.open(other)
    assert checkpoint.family is OTHER and checkpoint.published
    assert (checkpoint.heads, checkpoint.positions, checkpoint.text_length) == (28, 128, 256)
    assert checkpoint.tokenizer_folders == (other / "first", other / "second")


def test_a_familys_defaults_rank_below_a_checkpoints(other):
    (other / "defaults.yaml").write_text("sampling: {steps: 4}")
    settings = Checkpoint.open(other).resolve({"prompt": "a cat", "video": {"frame_num": 5}})
    assert (settings.sampling.steps, settings.sampling.shift) == (4, 3.0)
    assert (settings.video.frame_num, settings.video.fps) == (5, 24)


def test_all_tokenizers_are_needed(other):
    (other / "first").mkdir()
    (other / "first/tokenizer.json").touch()
    with pytest.raises(CheckpointError, match="second/tokenizer.json is missing"):
        Checkpoint.open(other).require_tokenizer()


def test_what_no_family_knows_is_refused_with_what_they_are(tmp_path, two_families):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(CheckpointError, match="is a FluxPipeline; only Wan and Other checkpoints are"):
        Checkpoint.open(tmp_path)


def test_the_folder_above_is_told_by_any_familys_landmarks(other):
    (other / "other.safetensors").touch()
    with pytest.raises(CheckpointError, match=f"is the folder above a checkpoint; give {other}"):
        Checkpoint.open(other.parent)


def test_of_a_hub_id_the_configurations_of_all_families_come_first(monkeypatch, other):
    asked = []
    for module in (recognition, checkpoints):
        monkeypatch.setattr(module, "download", lambda *given: (asked.append(given), other)[1])
    assert Checkpoint.open("someone/other", transformer="other.safetensors").family is OTHER
    first, second = asked
    assert first == ("someone/other", [*WAN.hub_files.configurations, "other.json"])
    assert second == ("someone/other", ("other.json", "other.*"), ("other.s*",))


def test_what_a_family_does_not_support_is_an_error_in_one_line():
    OTHER.require(fp8=True, lora=())
    with pytest.raises(InputError, match="^lora is not supported for Other; leave it out$"):
        OTHER.require(fp8=False, lora=("a.safetensors",))
    with pytest.raises(ValueError, match="'LoRA' is none of"):
        OTHER.require(LoRA=True)
