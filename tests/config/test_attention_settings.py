"""The `attention` of settings: profiles by file, flag and record, and what weights get that were not tuned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from places import ROOT

from nabla import InputError, KeepProfile, NablaConfig, Stretch
from wan import Checkpoint
from wan.config import attention_settings
from wan.config.attention_settings import attention_config, attention_to_dict, untuned_layer, untuned_pool
from wan.config.config_files import read_settings
from wan.config.model_settings import ModelSettings
from wan.config.settings import Settings, resolve
from wan.run.ratios import conditions, profile_measured_otherwise
from wan.serve.page.form import to_controls, to_form, to_layer
from wan.serve.page.sidecars import from_sidecar

ROOM = {"checkpoint": "somewhere", "prompt": "a cat"}
PROFILE = KeepProfile((Stretch(0.2, (1.0, 0.5)), Stretch(1.0, (0.5, 0.1))), {"checkpoint": "somewhere", "layers": 2})
CONTENT = PROFILE.to_dict() | {"pool": [1, 2, 2], "window": [3, 1, 1], "tile": [1, 4, 4]}
WANTED = NablaConfig(profile=PROFILE, pool=(1, 2, 2), window=(3, 1, 1), tile=(1, 4, 4))


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    return path


@pytest.mark.parametrize(
    "given", ({"profile": "own.yaml"}, {"algorithm": "profile:own.yaml"}, {"profile": CONTENT}, {"profile": "{}"})
)
def test_a_profile_by_file_by_flag_and_whole(file, given):
    given = {name: value.format(file) if value == "{}" else value for name, value in given.items()}
    lower = {"attention": {"algorithm": "nabla-0.7_min-0.1", "dense_steps": 3, "dense_layers": [0], "tile": [1, 8, 8]}}
    assert resolve({"attention": given}, lower, ROOM).attention == WANTED
    # What is said beside the file ranks above it.
    changed = resolve({"attention": given | {"window": [1, 1, 1], "mask_refresh": 2}}, lower, ROOM).attention
    assert changed == replace(WANTED, window=(1, 1, 1), mask_refresh=2)
    # Another algorithm takes its place.
    over = resolve({"attention": {"algorithm": "nabla-0.5"}}, {"attention": given}, ROOM).attention
    assert over == NablaConfig(threshold=0.5, tile=(1, 4, 4))
    assert attention_config(given) == WANTED


def test_a_file_is_found_beside_the_config_that_names_it_and_among_the_program_s(file, tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    file.rename(folder / "own.yaml")
    for number, attention in enumerate(({"profile": "own.yaml"}, {"algorithm": "profile:own.yaml"})):
        config = folder / f"{number}.yaml"
        config.write_text(yaml.safe_dump({"attention": attention}))
        assert resolve(read_settings(config), ROOM).attention == WANTED
        assert resolve(read_settings(f"elsewhere/{number}.yaml"), ROOM).attention == WANTED
    with pytest.raises(InputError, match="attention profile own.yaml cannot be read"):
        resolve({"attention": {"profile": "own.yaml"}}, ROOM)
    monkeypatch.setattr(attention_settings, "PROFILE_FOLDER", folder)
    assert resolve({"attention": {"profile": "own.yaml"}}, ROOM).attention == WANTED


def test_a_record_has_the_profile_whole(file):
    settings = resolve(ROOM, {"attention": {"profile": "own.yaml", "mask_refresh": 2}})
    plain = json.loads(json.dumps(settings.to_dict()))
    file.unlink()
    assert resolve(plain).attention == settings.attention == replace(WANTED, mask_refresh=2)
    assert resolve(plain).to_dict() == settings.to_dict() and "own.yaml" not in json.dumps(plain)
    # Names of videos come from this, and stay what they were without one.
    assert "profile" not in attention_to_dict(NablaConfig(keep=0.2))


@pytest.mark.parametrize("dense", ({"dense_steps": 0.2}, {"dense_layers": 0.25}, {"dense_steps": 3}))
def test_shares_are_read_and_recorded(dense):
    settings = resolve(ROOM, {"attention": {"algorithm": "keep-0.2"} | dense})
    assert settings.attention == NablaConfig(keep=0.2, **dense)
    assert resolve(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    "given, message",
    (
        ({"profile": "none.yaml"}, "attention profile none.yaml cannot be read: .*No such file"),
        ({"profile": "a\0b"}, "attention profile .* holds a null character"),
        ({"profile": 3}, "profile 3 is none"),
        ({"profile": {}}, "profile has no stretches"),
        ({"profile": CONTENT | {"keeps": 3}}, "profile has an unknown key 'keeps'"),
        ({"profile": CONTENT, "threshold": 0.5}, "threshold 0.5 does not go with a profile"),
        ({"profile": CONTENT, "dense_steps": 0.2}, "dense_steps 0.2 does not go with a profile"),
        ({"profile": CONTENT, "algorithm": "nabla-0.7"}, "algorithm 'nabla-0.7' beside a profile"),
        ({"profile": "own.yaml", "algorithm": "keep-0.1"}, "algorithm 'keep-0.1' beside a profile"),
        ({"profile": CONTENT | {"measured_on": {"card": {1, 2}}}}, "measured_on cannot be written to a record"),
        ({"algorithm": "profile-1234abcd"}, "algorithm 'profile-1234abcd' is not known"),
    ),
)
def test_what_is_no_profile_is_one_line(file, given, message):
    with pytest.raises(InputError, match=message) as error:
        resolve({"attention": given}, ROOM)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ("3", "[1]", "keep: [1]", ": :", "stretches: !!python/none 3"))
def test_files_that_are_no_profile(file, content):
    file.write_text(content)
    with pytest.raises(InputError, match="attention profile own.yaml (has no 'stretches'|cannot be read)"):
        resolve({"attention": {"profile": "own.yaml"}}, ROOM)


UNTUNED = {"attention": {"dense_steps": 0.25, "dense_layers": (0,), "pool": (1, 4, 4)}}


@pytest.mark.parametrize(
    "above, unsaid",
    (
        ([{"attention": {"algorithm": "keep-0.2"}}], UNTUNED),
        ([{"attention": {"algorithm": "keep-0.2_sta-3-3-3", "mask_refresh": 2}}, {}], UNTUNED),
        ([{"attention": {"algorithm": "nabla", "keep": 0.2}}], UNTUNED),
        ([{"attention": {"backend": "flex"}}, {"attention": {"keep": 0.2}}], UNTUNED),
        # What the run says of any of them stands, and stands alone.
        ([{"attention": {"algorithm": "keep-0.2", "dense_steps": 0}}], {}),
        ([{"attention": {"algorithm": "keep-0.2", "dense_layers": []}}], {}),
        ([{"attention": {"algorithm": "keep-0.2"}}, {"attention": {"dense_layers": [0, 1]}}], {}),
        ([{"attention": {"algorithm": "keep-0.2_pool-1-8-8"}}], {}),
        ([{"attention": {"algorithm": "keep-0.2", "pool": [1, 8, 8]}}], {}),
        # First steps of another algorithm fall with it.
        ([{"attention": {"algorithm": "keep-0.2"}}, {"attention": {"algorithm": "dense", "dense_steps": 3}}], UNTUNED),
        # Thresholds are what weights are tuned by, and all else is not chosen by the content.
        ([{"attention": {"algorithm": "nabla-0.7"}}], {}),
        ([{"attention": {"algorithm": "sta-3-3-3"}}], {}),
        ([{"attention": {"algorithm": "dense"}}], {}),
        ([{"attention": {"mask_refresh": 2}}], {}),
        ([{}], {}),
        ([{"attention": {"algorithm": "unknown"}}], {}),
        ([{"attention": {"algorithm": "keep-0.7"}}], {}),
    ),
)
def test_what_weights_get_that_were_not_tuned_for_a_share(above, unsaid):
    assert untuned_layer(above, [{"attention": {"algorithm": "keep-0.7"}}], "keep-0.7") == unsaid


@pytest.mark.parametrize(
    "tile, pool", (((1, 8, 8), (1, 4, 4)), ([2, 4, 8], (2, 2, 4)), ((1, 5, 8), None), ("8", None), ((0.5, 1, 1), None))
)
def test_parts_divide_the_tile(tile, pool):
    assert untuned_pool(tile) == pool


def test_a_checkpoint_s_own_share_runs_as_it_was_tuned(damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"sparse_algo": "keep-0.3"}))
    checkpoint = Checkpoint.open(damaged)

    def attention(**given) -> NablaConfig:
        return checkpoint.resolve({"prompt": "x", "attention": given}).attention

    assert attention() == attention(algorithm="keep-0.3") == NablaConfig(keep=0.3)
    untuned = NablaConfig(keep=0.2, pool=(1, 4, 4), dense_steps=0.25, dense_layers=(0,))
    assert attention(algorithm="keep-0.2") == untuned
    settings = checkpoint.resolve({"prompt": "x", "attention": {"algorithm": "keep-0.2"}})
    assert checkpoint.resolve(settings.to_dict()) == settings
    plain = checkpoint.resolve({"prompt": "x", "attention": {"algorithm": "keep-0.2", "dense_steps": 0}})
    assert plain.attention == NablaConfig(keep=0.2) and checkpoint.resolve(plain.to_dict()) == plain


def test_a_profile_of_other_layers_is_refused_before_anything_is_loaded():
    with pytest.raises(
        InputError, match="profile has shares of 2 layers, those of somewhere, and this transformer has"
    ):
        Checkpoint.open(ROOT / "checkpoints/wan-shapes").resolve({"prompt": "x", "attention": {"profile": CONTENT}})


def test_a_profile_that_was_measured_otherwise_is_said():
    settings = resolve(ROOM, {"attention": {"profile": CONTENT}})
    assert profile_measured_otherwise(settings) is None
    now = conditions(settings)
    other = KeepProfile(PROFILE.stretches, now | {"checkpoint": "another", "shift": 9.0, "steps": 8, "card": "none"})
    settings = replace(settings, model=replace(settings.model, attention=NablaConfig(profile=other)))
    line = "measured with checkpoint another, shift 9.0, and this runs with checkpoint somewhere, shift 5.0"
    assert f"the profile was {line}" in str(profile_measured_otherwise(settings))


def test_the_page_runs_a_profile_as_it_is_and_reads_no_file_of_one(file):
    base = Settings(ModelSettings("here", attention=WANTED), "x")
    form = to_form(base, "a cat")
    assert form.algorithm == WANTED.algorithm and to_controls(form.algorithm)[0] is None
    assert resolve(to_layer(replace(form, mask_refresh=2), base, {})).attention == replace(WANTED, mask_refresh=2)
    with pytest.raises(InputError, match="dense_steps 3 does not go with a profile"):
        resolve(to_layer(replace(form, dense_steps=3), base, {}))
    other = resolve(to_layer(replace(form, algorithm="keep-0.2", dense_steps=0.2), base, {})).attention
    assert other == NablaConfig(keep=0.2, dense_steps=0.2, tile=(1, 4, 4))
    with pytest.raises(InputError, match="attention algorithm 'profile:own.yaml' is not known"):
        to_layer(replace(form, algorithm="profile:own.yaml"), base, {})
    made = resolve(ROOM | {"checkpoint": "here"}, {"attention": {"profile": "own.yaml"}})
    assert from_sidecar(made.to_dict(), base, {}, {"here"}, {})[0].attention == WANTED
    for attention in ({"profile": "own.yaml"}, {"algorithm": "profile:/etc/passwd"}):
        with pytest.raises(InputError, match="attention names a file of a profile"):
            from_sidecar(ROOM | {"attention": attention}, base, {}, {"here"}, {})
