"""Runs that begin with a picture: what is settled before anything is loaded, and what records say of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import generate
from nabla import InputError
from wan import WanT2V
from wan.config.settings import resolve
from wan.files.picture import picture_hash
from wan.models import recognise as recognition
from wan.models.checkpoint import Checkpoint
from wan.models.family import MediaInputs
from wan.models.wan.family import WAN
from wan.run.jobs import name_of, read_prompts
from wan.run.sidecars import Sidecar, comparable

SMALL = "--frame_num 1 --sample_steps 1 --sample_guide_scale 1 --device cpu --size 64*48".split()


def upright(layout, picture, size):
    """A video of the asked width or height, whichever makes it lie as the picture does."""
    return tuple(sorted(size, reverse=picture[0] >= picture[1]))


@pytest.fixture
def given(monkeypatch):
    """A family that takes pictures, and those that its pipeline was given."""
    seen = []
    make = WanT2V.generate

    def remembered(self, prompt, image=None, **values):
        seen.append(image)
        return make(self, prompt, **values)

    monkeypatch.setattr(WanT2V, "generate", remembered)
    image = frozenset({"image"})
    inputs = {"text": MediaInputs(), "pictured": MediaInputs(required=image), None: MediaInputs(optional=image)}
    family = replace(
        WAN,
        kinds_of=lambda layout: frozenset({"text", "pictured"}),
        inputs_of=lambda layout, kind: inputs[kind],
        fit_size=upright,
    )
    monkeypatch.setattr(recognition, "FAMILIES", (family,))
    return seen


@pytest.fixture
def run(random_nano, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, code: int = 0) -> str:
        assert generate.main([*SMALL, "--ckpt_dir", str(random_nano), *flags]) == code
        return capsys.readouterr().err

    return run


@pytest.fixture
def tall(tmp_path):
    path = tmp_path / "tall.png"
    Image.new("RGB", (30, 60), (200, 30, 10)).save(path)
    return path


def test_a_picture_sets_the_size_and_stands_in_the_record(run, tall, given, tmp_path):
    said = run("--prompt", "A cat", "--image", "tall.png", "--base_seed", "1", "--save_file", "out.png")
    assert "size: 48x64 fits the picture, which is 30x60; 64x48 was asked for" in said
    assert f"image: {tall}, 30x60\n" in said and "video: 48x64" in said
    assert given[0].shape == (60, 30, 3) and (given[0] == (200, 30, 10)).all()
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["settings"]["image"] == str(tall) and record["settings"]["video"]["size"] == [48, 64]
    assert record["made_with"]["image"] == {"name": "tall.png", "sha256": picture_hash(tall)}
    assert "was asked for" not in run("--config", "out.json", "--size", "48*64", "--save_file", "again.png")


def test_a_changed_picture_is_warned_of_and_one_that_is_gone_is_an_error(run, tall, given, tmp_path):
    run("--prompt", "A cat", "--image", str(tall), "--base_seed", "1", "--save_file", "out.png")
    again = "--config", "out.json", "--save_file", "again.png"
    assert "warning" not in run(*again).replace("warning: 1 steps", "")
    Image.new("RGB", (30, 60)).save(tall)
    said = run(*again, "--overwrite")
    assert f"out.json was made from another picture than {tall} is now, so this video will differ" in said
    tall.unlink()
    assert run(*again, code=2) == f"error: image {tall} cannot be read (No such file or directory); " \
        "give a .png, .jpg or .webp\n"  # fmt: skip


def test_the_same_picture_elsewhere_is_the_same_video_and_another_one_is_not(run, tall, given, tmp_path):
    Image.new("RGB", (30, 60)).save(tmp_path / "black.png")
    lines = [json.dumps({"prompt": "A cat", "image": name}) for name in ("tall.png", "black.png")]
    (tmp_path / "prompts.txt").write_text("\n".join([*lines, "A cat"]))
    files = "--prompt_file", "prompts.txt", "--save_dir", "videos"
    run(*files)
    videos = sorted((tmp_path / "videos").glob("*.png"))
    assert len(videos) == 3 and [one is None for one in given] == [False, False, True]
    tall.rename(tmp_path / "moved.png")
    (tmp_path / "prompts.txt").write_text("\n".join([json.dumps({"prompt": "A cat", "image": "moved.png"}), lines[1]]))
    assert "prompts: 2, of which 2 are made already" in run(*files)


def test_names_belong_to_the_picture_s_content_and_records_open_no_picture(tall, tmp_path):
    settings = resolve({"checkpoint": "x", "prompt": "A cat", "image": str(tall)})
    own, digest = name_of(settings), picture_hash(tall)
    assert "image" not in resolve({"checkpoint": "x", "prompt": "A cat"}).to_dict()
    assert comparable(settings)["image"] == digest and resolve(settings.to_dict()) == settings
    record = {"settings": settings.to_dict(), "made_with": {"image": {"name": "tall.png", "sha256": digest}}}
    moved = tall.rename(tmp_path / "moved.png")
    (tmp_path / "a.json").write_text(json.dumps(record))
    (tmp_path / "b.json").write_text(json.dumps(record | {"made_with": {}}))
    assert name_of(replace(settings, image=str(moved))) == own
    assert Sidecar.read(tmp_path / "a.json").is_of(comparable(replace(settings, image=str(moved))))
    assert Sidecar.read(tmp_path / "b.json") is None
    with pytest.raises(InputError, match="tall.png cannot be read"):
        comparable(settings)


def test_what_takes_no_picture_refuses_it_before_anything_is_loaded(run, tall, monkeypatch):
    monkeypatch.setattr(WanT2V, "from_settings", None)
    said = run("--prompt", "A cat", "--image", "tall.png", code=2)
    assert said.endswith("is not taken by t2v, which starts from text alone; leave it out\n")


def test_a_picture_that_cannot_be_read_is_said_before_the_checkpoint_is_looked_for(run, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    flags = "--prompt", "A cat", "--ckpt_dir", "nobody/nothing"
    assert "text.png is no picture that can be read" in run(*flags, "--image", "text.png", code=2)
    (tmp_path / "prompts.txt").write_text('A cat\n{"prompt": "A dog", "image": "missing.png"}')
    assert "missing.png cannot be read" in run(*flags[2:], "--prompt_file", "prompts.txt", code=2)


def test_a_line_s_picture_is_a_path(tmp_path):
    (tmp_path / "prompts.txt").write_text('A cat\n{"prompt": "A dog", "image": 3}')
    with pytest.raises(InputError, match="line 2: image 3 is not the path of a file"):
        read_prompts(tmp_path / "prompts.txt")


def test_from_python_wan_refuses_a_picture(random_nano):
    pipe = WanT2V.from_pretrained(random_nano, device="cpu")
    with pytest.raises(InputError, match="image is not taken by this checkpoint, which starts from text alone"):
        pipe.generate("A cat", image=np.zeros((4, 4, 3), np.uint8))


def test_defaults_of_a_checkpoint_name_no_picture(damaged):
    (damaged / "defaults.yaml").write_text("image: x.png")
    with pytest.raises(InputError, match="may not name an image"):
        Checkpoint.open(damaged).resolve(needs_prompt=False)
