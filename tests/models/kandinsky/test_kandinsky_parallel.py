"""Kandinsky-5 on several processes on a CPU, over gloo: every layout gives what one process gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from PIL import Image
from places import PROGRAMS
from starting import finish, fork

import generate
from wan.models.kandinsky import picture, random_checkpoint

SMALL = "--size 64*48 --frame_num 5 --sample_steps 2 --device cpu --sparse_algo nabla-0.5".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Callable[[int], Path]:
    """Random ones by their numbers of heads, for videos that may begin with a picture."""

    def write(heads: int) -> Path:
        folder = tmp_path_factory.mktemp("heads") / "checkpoint"
        nano = random_checkpoint.MODELS["kandinsky5-nano"]
        sizes = replace(nano, heads=heads, dim=32 * heads)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(random_checkpoint.MODELS, "other", sizes)
            # Of a name that is not published, so that it may be for pictures or not.
            random_checkpoint.write("other", folder, torch.float32, file_name="small")
        return folder

    return write


@pytest.fixture
def drawn(tmp_path) -> Path:
    path = tmp_path / "drawn.png"
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("count, heads", ((2, 4), (4, 7)))
def test_every_layout_gives_what_one_process_gives(count, heads, checkpoint, tmp_path):
    program = fork(count, PROGRAMS / "kandinsky_layouts.py", checkpoint(heads), cwd=tmp_path)
    code, out, said = finish(program, seconds=300)
    assert code == 0, said
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == {2: 18, 4: 8}[count]
    for result in results:
        assert result.get("same", True) and result.get("error", 0) < 1e-5, result
        assert result.get("text_error", 0) < 1e-6, result
        # Of tables of few rows the first process holds more than its share.
        assert max(result.get("held", [0])) < 1.2 / count, result
        if result.get("what") == "cached":
            assert [result["reused"], result["forwards"]] == result["alone"] and result["reused"] > 0, result


def test_replicas_of_sharded_models_make_what_one_process_makes(checkpoint, drawn, tmp_path, monkeypatch):
    """Of a prompt, one that is cut, and one with a picture."""
    lines = [
        {"prompt": "A red circle", "seed": 1, "name": "circle"},
        {"prompt": "A blue boat and a cat on it. " * 40, "seed": 2, "name": "long"},
        {"prompt": "A cat", "seed": 3, "image": str(drawn), "name": "pictured"},
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--prompt_file", str(tmp_path / "prompts.txt"), "--ckpt_dir", str(checkpoint(4)), *SMALL, "--save_dir"]
    sharded = "--replicas", "2", "--dit_fsdp", "--t5_fsdp"
    code, _, said = finish(fork(4, PROGRAMS / "small_pictures.py", *flags, "four", *sharded, cwd=tmp_path))
    assert code == 0, said
    assert "layout: 4 processes: 2 replicas x 2 guidance branches" in said
    # All four read prompts, where text encoders are sharded; the leader of a video warns of its own.
    assert said.count("cut off are") == 1 and said.count("wrote ") == 3
    monkeypatch.setattr(picture, "SD_AREA", 64 * 48)
    assert generate.main([*flags, str(tmp_path / "one")]) == 0
    for name in ("circle", "long", "pictured"):
        own, alone = (iio.imread(tmp_path / folder / f"{name}.mp4") for folder in ("four", "one"))
        assert (own == alone).all()


def test_a_picture_that_a_leader_cannot_read_ends_all_in_one_line(checkpoint, drawn, tmp_path):
    command = [PROGRAMS / "faulty.py", "picture_gone", "0", "--prompt", "A cat", "--image", drawn]
    flags = ["--ckpt_dir", checkpoint(4), *SMALL, "--save_file", "out.mp4"]
    code, _, said = finish(fork(2, *command, *flags, cwd=tmp_path), seconds=60)
    assert code != 0 and said.count("error: ") == 1, said
    assert "drawn.png.gone cannot be read (No such file or directory); give a .png, .jpg or .webp" in said
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.png"]
