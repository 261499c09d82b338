"""What settings say of two experts: pairs of guidance scales, files and LoRA for either, and refusals of the rest."""

from __future__ import annotations

import json

import pytest

from nabla import InputError
from wan.config.model_settings import LoraFile, ModelSettings
from wan.config.settings import SamplingSettings, Settings, resolve


@pytest.mark.parametrize("given", ([3, 4.0], (3, 4.0), "3,4", "3.0, 4.0"))
def test_a_pair_of_scales_is_read_from_text_or_a_list(given):
    settings = resolve({"checkpoint": "x", "prompt": "A cat", "sampling": {"guide_scale": given}})
    assert settings.sampling.guide_scale == (3.0, 4.0) and settings.sampling.guided
    assert [settings.sampling.guide_scale_of(expert) for expert in (0, 1)] == [4.0, 3.0]
    assert resolve(json.loads(json.dumps(settings.to_dict()))) == settings


def test_guidance_of_one_expert_is_guidance():
    assert SamplingSettings(guide_scale=(1, 3)).guided and SamplingSettings(guide_scale=(3, 1)).guided
    assert not SamplingSettings(guide_scale=(1, 1)).guided and not SamplingSettings(guide_scale=1).guided


@pytest.mark.parametrize(
    "given, message",
    (
        ([3], r"guide_scale \[3\] is not two numbers"),
        ("3,4,5", r"guide_scale \[3.0, 4.0, 5.0\] is not two numbers"),
        ([3, 0.5], r"guide_scale 0.5 is not a number of at least 1 .*; 3.0,4.0 is usual"),
        ("3,x", r"guide_scale '3,x' is not a number"),
        ("nan,3", "guide_scale nan is not a number"),
        ([True, 3], "guide_scale True is not a number"),
        ({"low": 3}, "guide_scale {'low': 3} is not a number"),
    ),
)
def test_other_pairs_are_refused_in_a_line(given, message):
    with pytest.raises(InputError, match=message) as error:
        SamplingSettings(guide_scale=given)
    assert "\n" not in str(error.value)


def test_files_of_experts_are_read_from_text_or_a_mapping(tmp_path):
    high, low = tmp_path / "a.safetensors", tmp_path / "b,c:d.safetensors"
    files = {"high": str(high), "low": str(low)}
    for given in (files, f"high:{high},low:{low}", f"low:{low},high:{high}"):
        settings = ModelSettings("x", transformer=given)
        assert settings.transformer_files == files
        made = Settings(settings, "A cat")
        assert made.to_dict()["transformer"] == files and resolve(json.loads(json.dumps(made.to_dict()))) == made
    one = ModelSettings("x", transformer=f"low:{low}")
    assert one.transformer_files == {"low": str(low)}
    assert Settings(one).to_dict()["transformer"] == {"low": str(low)}
    # Of no expert: a plain path, whatever colons it has.
    assert ModelSettings("x", transformer=str(low)).transformer_files == {None: str(low)}
    assert ModelSettings("x", transformer="./high:a").transformer.endswith("/high:a")
    assert Settings(ModelSettings("x")).to_dict()["transformer"] is None


@pytest.mark.parametrize(
    "given, expert, scale",
    (
        ("high:{}:0.5", "high", 0.5),
        ("low:{}", "low", 1.0),
        ("{}:0.5", None, 0.5),
        ("{}", None, 1.0),
        ({"file": "{}", "expert": "low"}, "low", 1.0),
    ),
)
def test_a_lora_names_its_expert(tmp_path, given, expert, scale):
    file = str(tmp_path / "a:b.safetensors")
    if isinstance(given, dict):
        given = given | {"file": file}
    else:
        given = given.format(file)
    lora = LoraFile.parse(given)
    assert (lora.file, lora.expert, lora.scale) == (file, expert, scale)
    settings = Settings(ModelSettings("x", lora=(lora,)), "A cat")
    # Records without experts stay what they were.
    plain = {"file": file, "scale": scale}
    assert settings.to_dict()["lora"] == (plain if expert is None else plain | {"expert": expert},)
    assert resolve(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    "settings, count, message",
    (
        ({"transformer": "high:a"}, 1, "transformer high:... is for a checkpoint of two experts.*; leave high: out"),
        ({"lora": ["low:a:1"]}, 1, "lora low:... is for a checkpoint of two experts.*; leave low: out"),
        ({"transformer": "/a"}, 2, "transformer /a could stand in for either expert .*; write high:FILE or low:FILE"),
    ),
)
def test_files_have_to_suit_the_number_of_transformers(settings, count, message):
    with pytest.raises(InputError, match=message):
        ModelSettings("x", **settings).check_experts(count)
    ModelSettings("x", **settings).check_experts(3 - count)


@pytest.mark.parametrize(
    "settings, message",
    (
        ({"transformer": {"middle": "a"}}, "transformer has an unknown key 'middle'; allowed are high, low"),
        ({"transformer": {}}, "transformer names no file; give one of high or low"),
        ({"transformer": "high:a,high:b"}, "names the high expert twice"),
        ({"transformer": "high:"}, "transformer of high noise '' is not the path of a file"),
        ({"lora": [{"file": "a", "expert": "x"}]}, "lora expert 'x' is not known; use high or low"),
    ),
)
def test_experts_that_are_not_there_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ModelSettings("x", **settings)
