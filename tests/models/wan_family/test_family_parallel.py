"""All of Wan's kinds on several processes on a CPU, over gloo: latents, and videos by generate.py."""

from __future__ import annotations

import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from picture_pipelines import picture
from places import PROGRAMS, ROOT
from starting import finish, fork
from wan_family_sets import KIND_OF, TWO_EXPERTS

import generate
from wan.models.wan import random_checkpoint

SMALL = "--size 64*64 --frame_num 5 --sample_steps 2 --base_seed 1 --device cpu --sparse_algo nabla-0.5".split()


@pytest.mark.parametrize("count", (2, 4))
def test_every_layout_gives_the_latents_of_one_process(count, tmp_path):
    code, out, said = finish(fork(count, PROGRAMS / "family_layouts.py", cwd=tmp_path), seconds=300)
    assert code == 0, said
    results = [json.loads(line) for line in out.splitlines()]
    for result in results:
        assert result["error"] < 1e-5, result
    texts = [result for result in results if result["case"] == "text"]
    walks = [result for result in results if result["case"] != "text"]
    assert {result["task"] for result in texts} == set(KIND_OF)
    for result in walks:
        assert result["same"], result
        # What the VAE alone reads apart, of each block a process holds its part.
        assert result["held"] < 0.3 + 0.5 / (count // 2) if result["sharded"] else result["held"] == 1, result
        # Where branches run apart, each process counts the forwards of its own.
        if result["case"]["cache"]:
            assert 0 < result["reused"] * result["layout"]["cfg"] == result["reused_alone"], result
    for layout in {json.dumps(result["layout"]) for result in walks}:
        own = [result for result in walks if json.dumps(result["layout"]) == layout]
        replicas = json.loads(layout)["replicas"] > 1
        assert {result["task"] for result in own} == ({"wan22_i2v"} if replicas else set(KIND_OF))
        assert replicas or {result["case"]["cache"] for result in own if result["task"] in TWO_EXPERTS} == {
            *(None, "taylorseer", "first_block")
        }


@pytest.mark.parametrize(
    "kind, flags", (("i2v-A14B", ()), ("ti2v-5B", ("--ulysses_size", "2", "--dit_fsdp", "--t5_fsdp")))
)
def test_the_same_video_from_a_picture_from_one_process_and_from_two(kind, flags, tmp_path):
    random_checkpoint.write(f"{kind}-nano", tmp_path / "checkpoint", torch.float32)
    iio.imwrite(tmp_path / "picture.png", picture(40, 40))
    given = ["--prompt", "A red circle", "--image", str(tmp_path / "picture.png"), *SMALL]
    given += ["--ckpt_dir", str(tmp_path / "checkpoint"), "--save_file"]
    assert generate.main([*given, str(tmp_path / "one.mp4")]) == 0
    code, _, said = finish(fork(2, ROOT / "generate.py", *given, "two.mp4", *flags, cwd=tmp_path))
    assert code == 0, said
    one, two = (iio.imread(tmp_path / name).astype(int) for name in ("one.mp4", "two.mp4"))
    assert np.abs(one - two).max() <= 2 and one.std() > 1
    split = "2 ways of the sequence" if flags else "2 guidance branches"
    assert said.count("wrote ") == 1 and f"layout: 2 processes: {split}" in said
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert records[0]["settings"]["image"] == records[1]["settings"]["image"]
