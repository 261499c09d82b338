"""Likeness of videos, the attention that kept blocks hold, and the script that measures them."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys

import imageio.v3 as iio
import pytest
import torch
from places import ROOT

import nabla
from nabla import NablaConfig
from wan.shapes.accuracy import worker_map
from wan.tools.quality import density_and_mass, psnr, ssim

SCRIPT = ROOT / "scripts" / "measure_quality.py"


def test_likeness():
    video = torch.randint(0, 256, (2, 32, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert psnr(video, video) == math.inf and ssim(video, video) == pytest.approx(1)
    dark, bright = torch.full_like(video, 100), torch.full_like(video, 110)
    assert psnr(dark, bright) == pytest.approx(20 * math.log10(25.5))
    # Of flat pictures only the means differ.
    a, b = 100 / 255, 110 / 255
    assert ssim(dark, bright) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-4)
    assert ssim(video, video.flip(1)) < 0.1


@pytest.mark.parametrize("grid", ((2, 16, 16), (1, 11, 19)))
def test_mass_is_that_of_the_kept_tokens(grid, monkeypatch):
    monkeypatch.setattr("wan.tools.quality.PAIRS", 2**14)
    q, k = torch.randn(2, 1, math.prod(grid), 3, 16, generator=torch.Generator().manual_seed(0))
    config = NablaConfig(keep=0.4)
    kept, mass = density_and_mass(q, k, grid, config)
    blocks = nabla.select_blocks(q, k, grid, config)
    slots = nabla.plan(grid, config, "cpu").selection.layout.slot // 64
    allowed = blocks[:, :, slots][..., slots]
    shares = torch.einsum("bqhd,bkhd->bhqk", q, k).div(4).softmax(-1)
    torch.testing.assert_close(mass, (shares * allowed).sum(-1).mean((0, 2)))
    torch.testing.assert_close(kept, blocks.float().mean((0, 2, 3)))


def test_videos_are_measured_by_other_processes_as_by_this_one():
    video = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with worker_map(1) as each:
        assert list(each(psnr, [video, video], [video, video.flip(0)])) == [math.inf, psnr(video, video.flip(0))]


def test_script_takes_sentences_of_people(random_nano, tmp_path, monkeypatch, capsys):
    sentences = tmp_path / "sentences.yaml"
    sentences.write_text("- {text: nothing, shapes: []}\n- {text: a red ball, shapes: [{kind: circle, colour: red}]}\n")
    flags = f"--ckpt_dir {random_nano} --sentences {sentences} --save_dir {tmp_path / 'a'} --device cpu"
    flags += " --size 64*64 --frame_num 9 --steps 1 --guide_scale 1"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    (record,) = (tmp_path / "a" / "dense").glob("*.json")
    assert ended.value.code == 0 and json.loads(record.read_text())["prompt"] == "a red ball"
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["colour"] == 0 and row["direction"] == row["background"] == 1


def test_script_compares_attentions(random_nano, tmp_path, monkeypatch, capsys):
    flags = "--count 2 --batch 2 --size 64*64 --frame_num 9 --steps 1 --mass 1 --device cpu".split()
    flags += ["--ckpt_dir", str(random_nano), "--save_dir", str(tmp_path / "videos")]
    flags += ["--picture", str(tmp_path / "picture.png")]
    again = f"dense@{shutil.copytree(random_nano, tmp_path / 'again')}"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags, "--sparse_algo", "dense", "nabla-1.0", "keep-0.3", again])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    dense, exact, sparse, same = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert exact["kept"] == exact["mass"] == 1 and exact["psnr"] > 60 > sparse["psnr"]
    assert 0.3 <= sparse["kept"] < sparse["mass"] < 1 and {"colour", "kind", "direction", "all"} <= dense.keys()
    assert same["psnr"] == math.inf
    assert len(list(tmp_path.glob("videos/*/*.mp4"))) == 8
    assert iio.imread(tmp_path / "picture.png").shape == (4 * 96, 2 * 3 * 96, 3)
