"""The checkpoint that comes with the program: what runs if nothing else is named, and what it makes of sentences."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from conftest import relative_error

import generate
from wan import WanT2V, latents
from wan.cache_settings import measured_otherwise
from wan.checkpoint import Checkpoint
from wan.convert import convert
from wan.training.measure import background_colour, measured

SHIPPED = Path(generate.SMALL_CHECKPOINT)


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
        monkeypatch.setattr(Checkpoint, "open", lambda name, with_transformer=True: pytest.fail(f"opens {name}"))
        with pytest.raises(pytest.fail.Exception, match=f"opens .*{name}"):
            generate.main(["--prompt", "a cat", "--device", "cpu", "--save_file", str(tmp_path / "out.mp4"), *flags])


def test_it_fits_into_git():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 40e6
    assert not [file for file in SHIPPED.rglob("*") if file.suffix in (".pth", ".pt", ".bin")]


def test_it_brings_ratios_that_are_those_of_its_own_settings():
    own = Checkpoint.open(SHIPPED).resolve({"prompt": "a cat", "cache": f"mag:0.06:{SHIPPED / 'mag_ratios.json'}"})
    assert len(own.cache.ratios) == own.sampling.steps and own.cache.measured_on["checkpoint"] == SHIPPED.name
    assert measured_otherwise(own) is None


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
