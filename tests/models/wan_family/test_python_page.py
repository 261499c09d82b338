"""The examples of docs/python.md, with tiny checkpoints and videos in place of those that they name."""

from __future__ import annotations

import re
from dataclasses import replace

import imageio
import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT
from safetensors.torch import load_file, save_file

import wan
from wan.config.settings import changed
from wan.models.wan import random_checkpoint

NANO = {
    "Wan-AI/Wan2.1-I2V-14B-480P": "i2v-nano",
    "Wan-AI/Wan2.1-VACE-1.3B": "vace-nano",
    "Wan-AI/Wan2.2-T2V-A14B": "t2v-A14B-nano",
}
# What the page has, and a smaller one in its place.
SIZES = {"(832, 480)": "(64, 32)", "frame_num=81": "frame_num=5", "16, 21, 60, 104": "16, 2, 4, 8"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    for model in NANO.values():
        random_checkpoint.write(model, folder / model, torch.float32)
    return folder


@pytest.fixture(scope="module")
def examples():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    section = page.partition("## Wan from pictures and videos\n")[2].partition("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(found) == len(NANO)
    for full, small in SIZES.items():
        assert full in "".join(found)
        found = [text.replace(full, small) for text in found]
    return [text.replace("wan.from_pretrained", "load") for text in found]


def test_examples_of_pictures_videos_and_experts_run_as_they_stand(checkpoints, examples, tmp_path, monkeypatch):
    def load(name, device="cpu", dtype=torch.float32, **options):
        pipe = wan.from_pretrained(checkpoints / NANO[name], **options)
        pipe.video = changed(pipe.video, size=(64, 64), frame_num=5)
        pipe.sampling = replace(pipe.sampling, steps=2)
        return pipe

    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0).integers
    for name in ("cat.png", "mask.png"):
        Image.fromarray(draw(0, 256, (64, 64, 3), dtype=np.uint8)).save(name)
    imageio.mimsave("dog.mp4", list(draw(0, 256, (5, 64, 64, 3), dtype=np.uint8)), fps=16)
    low = load_file(checkpoints / "t2v-A14B-nano" / "low_noise_model" / "diffusion_pytorch_model.safetensors")
    save_file(low, "low.safetensors")
    layer = "blocks.0.self_attn.q"
    factors = {f"{layer}.lora_A.weight": torch.ones(1, 128), f"{layer}.lora_B.weight": torch.ones(128, 1)}
    save_file(factors, "style.safetensors")

    names = {"torch": torch, "wan": wan, "load": load}
    exec(examples[0], names)
    assert names["beside"].shape == (20, 2, 4, 8) and names["beside"].clip is not None
    assert names["video"].shape == (5, 32, 64, 3) and names["pixels"].shape == (3, 5, 32, 64)
    exec(examples[1], names)
    assert names["beside"].shape == (96, 3, 8, 8) and names["latents"].shape == (16, 2, 8, 8)
    assert (names["beside"].references, names["beside"].context_scale) == (1, 0.8)
    assert names["video"].shape == (5, 64, 64, 3)
    exec(examples[2].replace("low.gguf", "low.safetensors"), names)
    assert names["video"].shape == (5, 64, 64, 3) and len(names["pipe"].transformers) == 2
