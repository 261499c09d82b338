"""The checkpoint that comes with the program: what runs if nothing else is named, and what it makes of sentences."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from conftest import relative_error
from places import ROOT

import generate
from wan import WanT2V
from wan.models.checkpoint import Checkpoint
from wan.models.wan import latents
from wan.models.wan.convert import convert
from wan.run.flags import SMALL_CHECKPOINT
from wan.run.ratios import measured_otherwise
from wan.shapes.measure import background_colour, measured

SHIPPED = Path(SMALL_CHECKPOINT)


def test_it_is_what_runs_if_nothing_is_named_and_shows_what_is_said(tmp_path, capsys):
    out = tmp_path / "out.mp4"
    prompt = "a blue square moves up on a yellow background"
    # Fewer steps and frames than its own settings take.
    fewer = ["--base_seed", "1", "--sample_steps", "8", "--frame_num", "17"]
    assert generate.main(["--prompt", prompt, *fewer, "--device", "cpu", "--save_file", str(out)]) == 0
    said = capsys.readouterr().err
    assert "checkpoints/wan-shapes, a small model" in said and "for Wan2.1 14B add --config nabla_0.7.yaml" in said
    video = torch.from_numpy(iio.imread(out))
    assert video.shape == (17, 256, 256, 3)
    (shape,) = measured(video)
    assert (shape.colour, shape.kind, shape.motion, background_colour(video)) == ("blue", "square", "up", "yellow")


def test_a_task_or_a_config_still_names_its_own(tmp_path, monkeypatch, capsys):
    for flags, name in ((["--task", "t2v-1.3B"], "Wan-AI/Wan2.1-T2V-1.3B"), (["--config", "full.yaml"], "T2V-14B")):
        monkeypatch.setattr(Checkpoint, "open", lambda name, *_: pytest.fail(f"opens {name}"))
        with pytest.raises(pytest.fail.Exception, match=f"opens .*{name}"):
            generate.main(["--prompt", "a cat", "--device", "cpu", "--save_file", str(tmp_path / "out.mp4"), *flags])


def test_it_fits_into_git():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 40e6
    assert not [file for file in SHIPPED.rglob("*") if file.suffix in (".pth", ".pt", ".bin")]


def test_it_brings_ratios_that_are_those_of_its_own_settings():
    own = Checkpoint.open(SHIPPED).resolve({"prompt": "a cat", "cache": f"mag:0.06:{SHIPPED / 'mag_ratios.json'}"})
    assert len(own.cache.ratios) == own.sampling.steps and own.cache.measured_on["checkpoint"] == SHIPPED.name
    assert measured_otherwise(own) is None


@pytest.fixture
def make(tmp_path):
    """The script that makes it, run with a `python` that writes down its arguments, where torch sees so many GPUs."""
    script = tmp_path / "scripts" / "train_shapes.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / script.relative_to(tmp_path), script)
    python = tmp_path / "python"

    def run(gpus: int, *stages: str) -> tuple[list[str], str]:
        python.write_text(f"""#!/bin/sh\nif [ "$1" = -c ]; then echo {gpus}; else echo "$*"; fi\n""")
        python.chmod(0o755)
        env = os.environ | {"PYTHON": str(python)}
        done = subprocess.run(["bash", script, *stages], env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines(), done.stderr

    return run


@pytest.mark.parametrize(
    "gpus, used", ((1, (1, 1, 1)), (2, (2, 2, 2)), (3, (2, 2, 2)), (6, (4, 4, 4)), (7, (4, 4, 4)), (20, (16, 16, 16)))
)
def test_it_is_trained_on_the_gpus_that_can_share_a_batch(make, gpus, used):
    lines, said = make(gpus, "vae", "256", "distill")
    trained = [line for line in lines if "/train" in line.split(" --config")[0]]
    assert [int(line.partition("nproc_per_node=")[2].split()[0]) for line in trained] == list(used)
    assert [line.partition("micro_batch=")[2] for line in trained[1:]] == [str(128 // used[1]), str(16 // used[2])]
    assert said.count(f"of {gpus} GPUs are used") == (3 if used[0] < gpus else 0)
    # Samples are dealt out one by one.
    assert sum(f"nproc_per_node={gpus} scripts/prepare_data.py" in line for line in lines) == 2


@pytest.mark.parametrize("gpus, micro", ((1, ("16", "32")), (4, ("16", "16")), (8, ("8", "8"))))
def test_a_gpu_takes_no_more_large_clips_at_once_than_fit(make, gpus, micro):
    lines, _ = make(gpus, "512", "both")
    assert tuple(line.partition("micro_batch=")[2] for line in lines if "scripts/train.py" in line) == micro


def test_it_is_shipped_in_place_of_an_earlier_one(make, tmp_path):
    earlier = tmp_path / "runs" / "wan-shapes"
    earlier.mkdir(parents=True)
    (earlier / "config.json").touch()
    ((line,), _) = make(1, "ship")
    assert line.startswith("scripts/convert_checkpoint.py ") and "--out runs/wan-shapes " in line
    assert not earlier.exists()


@torch.no_grad()
def test_it_is_the_same_in_the_published_layout_and_back(tmp_path):
    """That layout has no latent statistics, so they are folded into the VAE."""
    convert(Checkpoint.open(SHIPPED), tmp_path / "published", "published", torch.float32)
    convert(Checkpoint.open(tmp_path / "published"), tmp_path / "back", "diffusers")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 3, 8, 8, generator=generator)
    video = torch.rand(1, 3, 9, 64, 64, generator=generator) * 2 - 1
    exact = None
    for folder in (SHIPPED, tmp_path / "published", tmp_path / "back"):
        pipe = WanT2V.from_pretrained(folder)
        context = pipe.encode_text(*pipe.tokenize("a red circle moves to the right"))
        found = {
            "text states": context,
            "forward": pipe.transformer(noise, torch.tensor([700.0]), context, return_dict=False)[0],
            "latents": latents.encode(pipe.vae, video),
            "decoded": latents.decode(pipe.vae, noise),
        }
        exact = exact or found
        for name, value in found.items():
            assert relative_error(value, exact[name]) < 1e-4, (folder, name)
        assert pipe.sampling.steps == 30 and pipe.video.size == (256, 256)
