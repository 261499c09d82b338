"""Each published checkpoint of Kandinsky-5 by its own config, as a user runs it, on random weights of its layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image
from places import ROOT
from starting import Forked, finish

import generate
from wan import Checkpoint
from wan.config.settings import resolve
from wan.models.kandinsky.family import KANDINSKY
from wan.models.kandinsky.layout import NEGATIVE_PROMPT
from wan.run.advice import unexpected

SMALL = "--frame_num 5 --sample_steps 2 --base_seed 1 --device cpu --prompt".split() + ["A red circle"]
WINDOWED = "nabla-0.9_sta-11-3-3"
# By its file in model/, which its config is named after too: the attention that it was trained for, steps and guidance.
NATIVE = {
    "lite_t2v_pretrain_5s": (None, 50, 5),
    "lite_t2v_pretrain_10s": (WINDOWED, 50, 5),
    "lite_t2v_sft_5s": (None, 50, 5),
    "lite_t2v_sft_10s": (WINDOWED, 50, 5),
    "lite_t2v_distilled16steps_5s": (None, 16, 1),
    "lite_t2v_nocfg_5s": (None, 50, 1),
    "lite_t2v_nocfg_10s": (WINDOWED, 50, 1),
    "lite_t2v_distilled16steps_10s": (WINDOWED, 16, 1),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run generate.py in an empty directory: `run(*flags)` -> (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: object) -> tuple[int, str]:
        code = generate.main([str(flag) for flag in flags])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def native(kandinsky_nano, tmp_path):
    """`native(name)`: the tiny checkpoint with its transformer called as one is published."""

    def native(name: str):
        folder = shutil.copytree(kandinsky_nano, tmp_path / name)
        (file,) = (folder / "model").iterdir()
        file.rename(file.with_name(f"kandinsky5{name}.safetensors"))
        return folder

    return native


def settings_of(file: str) -> dict:
    with open(file) as record:
        return json.load(record)["settings"]


def check_again(run) -> None:
    """That the record of out.mp4 makes it again, and is itself the same then."""
    code, said = run("--config", "out.json", "--save_file", "again.mp4", "--device", "cpu")
    assert code == 0 and "will differ" not in said
    assert (iio.imread("again.mp4") == iio.imread("out.mp4")).all()
    assert settings_of("again.json") == settings_of("out.json")


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_checkpoint_by_its_config_and_again_by_its_record(run, native, name):
    own, steps, guide_scale = NATIVE[name]
    folder, config = native(name), f"kandinsky5_{name.replace('_t2v', '')}.yaml"
    few = SMALL if steps == 50 else [word for word in SMALL if word not in ("--sample_steps", "2")]
    code, said = run("--config", config, "--ckpt_dir", folder, "--size", "128*64", "--save_file", "out.mp4", *few)
    assert code == 0 and "warning" not in said, said
    assert f"attention: {own or 'dense'}, " in said
    assert iio.imread("out.mp4").shape == (5, 64, 128, 3) and iio.immeta("out.mp4")["fps"] == 24
    settings = settings_of("out.json")
    assert settings["kind"] == "kandinsky5-lite-t2v" and settings["checkpoint"] == str(folder)
    asked = {"steps": 2 if steps == 50 else steps, "guide_scale": guide_scale, "solver": "euler", "shift": 5.0}
    assert settings["sampling"] == asked | {"seed": 1, "negative_prompt": NEGATIVE_PROMPT}
    check_again(run)


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_checkpoint_runs_without_a_config_as_its_config_says(run, native, name):
    own, steps, guide_scale = NATIVE[name]
    folder = native(name)
    left = Checkpoint.open(folder).resolve(needs_prompt=False)
    assert (left.sampling.steps, left.sampling.guide_scale) == (steps, guide_scale)
    assert (left.video.size, left.video.frame_num) == ((768, 512), 241 if name.endswith("10s") else 121)
    flags = *SMALL, "--size", "128*64", "--ckpt_dir", folder
    assert run("--config", f"kandinsky5_{name.replace('_t2v', '')}.yaml", "--save_file", "a.mp4", *flags)[0] == 0
    assert run("--save_file", "b.mp4", *flags)[0] == 0
    one, other = (settings_of(file) | {"kind": None} for file in ("a.json", "b.json"))
    assert one == other and (iio.imread("a.mp4") == iio.imread("b.mp4")).all()


@pytest.mark.parametrize("config, algorithm", (("sd", "dense"), ("hd", "nabla-0.8_sta-11-3-3")))
def test_image_to_video_in_diffusers_layout(run, kandinsky_diffusers, tmp_path, monkeypatch, config, algorithm):
    # The published sizes would take minutes here.
    monkeypatch.setattr("wan.models.kandinsky.picture.SD_AREA", 128 * 64)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((256, 128)).save(tmp_path / "first.png")
    flags = "--config", f"kandinsky5_pro_i2v_5s_{config}.yaml", "--ckpt_dir", kandinsky_diffusers, "--size", "64*64"
    code, said = run(*flags, "--image", "first.png", "--save_file", "out.mp4", *SMALL)
    assert code == 0 and "size: 128x64 fits the picture, which is 256x128; 64x64 was asked for" in said
    assert f"attention: {algorithm}, " in said
    assert iio.imread("out.mp4").shape == (5, 64, 128, 3) and iio.immeta("out.mp4")["fps"] == 24
    settings = settings_of("out.json")
    assert settings["kind"] == "kandinsky5-pro-i2v" and settings["image"] == str(tmp_path / "first.png")
    assert settings["sampling"]["guide_scale"] == 5 and settings["sampling"]["negative_prompt"] == NEGATIVE_PROMPT
    check_again(run)
    # The picture is seen.
    Image.fromarray(255 - pixels).resize((256, 128)).save(tmp_path / "first.png")
    code, said = run("--config", "out.json", "--save_file", "other.mp4", "--device", "cpu")
    assert code == 0 and "out.json was made from another picture than" in said
    assert (iio.imread("other.mp4") != iio.imread("out.mp4")).any()


def test_as_a_program(kandinsky_nano, tmp_path):
    flags = "--ckpt_dir", kandinsky_nano, "--size", "128*64", "--save_file", "out.mp4", *SMALL
    code, _, said = finish(Forked(ROOT / "generate.py", *flags, cwd=tmp_path))
    assert code == 0 and said.splitlines()[-1] == "wrote out.mp4 and out.json", said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.mp4"]


@pytest.mark.parametrize(
    "name, algorithm, warned",
    (
        ("kandinsky5pro_t2v_sft_5s", "dense", False),
        ("kandinsky5pro_t2v_sft_10s", "nabla-0.9_sta-11-3-3", False),
        ("kandinsky5pro_t2v_sft_10s", "dense", True),
        ("kandinsky5lite_t2v_sft_10s", "dense", True),
    ),
)
def test_attention_published_for_other_sizes_is_not_warned_of(name, algorithm, warned):
    config = {"published_as": name, "sparse_algo": "nabla-0.7_sta-11-3-3", "num_visual_blocks": 3}
    checkpoint = Checkpoint(name, Path(), True, config, KANDINSKY)
    settings = resolve({"checkpoint": name, "prompt": "a cat", "attention": {"algorithm": algorithm}})
    assert any("was made for" in line for line in unexpected(checkpoint, settings)) == warned
