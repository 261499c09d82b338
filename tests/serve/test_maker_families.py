"""Videos of another family than the one that our own checkpoint is of, by the process that holds a model."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from wan.models.kandinsky import random_checkpoint
from wan.run.request import Options
from wan.serve.workers.maker import Maker
from wan.serve.workers.messages import Failed, Made, Order, Progress

LAYER = "transformer.visual_transformer_blocks.0.self_attention.to_query"
SMALL = {"prompt": "a cat " * 300, "video": {"size": "32*32", "frame_num": 5}, "sampling": {"steps": 2}}


@pytest.fixture(scope="module")
def maker(tmp_path_factory) -> Maker:
    folder = tmp_path_factory.mktemp("kandinsky") / "checkpoint"
    random_checkpoint.write("kandinsky5-nano", folder, torch.float32, "diffusers")
    return Maker(Options(device="cpu"), str(folder))


def write_lora(path, width):
    factors = {f"{LAYER}.lora_A.weight": torch.randn(2, width), f"{LAYER}.lora_B.weight": torch.randn(width, 2)}
    save_file(factors, path)
    return str(path)


def test_kandinskys_videos_come_with_a_glimpse_notes_and_lora(maker, tmp_path):
    told: list[Progress] = []

    def make(**layer):
        return maker.make(Order("video_1", SMALL | layer), told.append, lambda: False)

    made = make()
    assert isinstance(made, Made) and made.settings["sampling"]["solver"] == "euler"
    preview = next(one.preview for one in told if one.preview is not None)
    assert Image.open(io.BytesIO(preview)).size == (32, 32)
    assert any("cut off are" in note for note in told[-1].notes)
    unfit = make(lora=[write_lora(tmp_path / "unfit.safetensors", 64)])
    assert isinstance(unfit, Failed) and "unfit.safetensors" in unfit.message
    fit = make(lora=[write_lora(tmp_path / "fit.safetensors", 128)])
    assert isinstance(fit, Made) and fit.settings["lora"][0]["file"].endswith("fit.safetensors")
