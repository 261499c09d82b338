"""The page's studio with a checkpoint of another family than the one it ships with."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from nabla import InputError
from wan.models.kandinsky import random_checkpoint
from wan.run.request import Options
from wan.serve.limits import Limits
from wan.serve.studio import Studio

LAYER = "transformer.visual_transformer_blocks.0.self_attention.to_query"
SMALL = {"prompt": "a cat " * 300, "video": {"size": "32*32", "frame_num": 5}, "sampling": {"steps": 2}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kandinsky") / "checkpoint"
    random_checkpoint.write("kandinsky5-nano", folder, torch.float32, "diffusers")
    return folder


def write_lora(path, width):
    factors = {f"{LAYER}.lora_A.weight": torch.randn(2, width), f"{LAYER}.lora_B.weight": torch.randn(width, 2)}
    save_file(factors, path)
    return str(path)


def test_a_studio_makes_kandinskys_videos_with_a_glimpse_notes_and_lora(checkpoint, tmp_path):
    with Studio(Options(device="cpu"), tmp_path / "videos", str(checkpoint), Limits(steps=1000)) as studio:
        job = studio.submit(SMALL)
        list(job.changes())
        assert job.result().settings.sampling.solver == "euler"
        assert job.progress.preview.shape == (32, 32, 3)
        assert any("cut off are" in note for note in job.progress.notes)
        pipe = studio._pipe
        unfit = studio.submit(SMALL | {"lora": [write_lora(tmp_path / "unfit.safetensors", 64)]})
        list(unfit.changes())
        with pytest.raises(InputError, match="unfit.safetensors"):
            unfit.result()
        # A file that does not fit costs no models.
        assert studio._pipe is pipe
        fit = studio.submit(SMALL | {"lora": [write_lora(tmp_path / "fit.safetensors", 128)]})
        list(fit.changes())
        assert fit.result().path.is_file() and studio._pipe is not pipe
