"""Training of the VAE on `shapes`: its passes over whole clips, exact continuation, and what it leaves behind."""

from __future__ import annotations

import copy
import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from places import ROOT
from shapes_runs import vae_settings_dict

from nabla import InputError
from wan.config.config_files import CONFIG_FOLDER, read_settings
from wan.models.wan import latents
from wan.models.wan.components import vae_component
from wan.models.wan.whole_clips import posterior, reconstruction, take_whole_clips
from wan.shapes import train_vae as vae_training
from wan.shapes.train_vae import VaeTrainer
from wan.shapes.vae_data import VideoPools
from wan.shapes.vae_model import vae_loss
from wan.shapes.vae_settings import LossSettings, VaeSettings
from wan.training.metrics import METRICS_FILE, read_metrics
from wan.training.models import open_components
from wan.training.schema import with_overrides
from wan.training.shutdown import Diverged, Stopped

CPU = torch.device("cpu")
# What a row says of the training itself, rather than of its speed.
EXACT = ("step", "loss", "kl", "lr", "grad_norm", "psnr")


def train(settings: dict[str, Any], **limits: float) -> bool:
    return VaeTrainer(VaeSettings.from_dict(settings)).run(**limits)


def exact_rows(run: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in EXACT if key in row} for row in read_metrics(run / METRICS_FILE)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "run"
    assert train(vae_settings_dict(folder))
    return folder


@pytest.mark.parametrize("frames", (1, 5, 13))
def test_whole_clips_give_what_diffusers_gives_by_chunks(frames):
    torch.manual_seed(0)
    chunked = AutoencoderKLWan(base_dim=4, z_dim=4)
    for weight in chunked.parameters():
        torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5) if weight.ndim > 1 else None
    whole = copy.deepcopy(chunked)
    take_whole_clips(whole)
    video = torch.rand(2, 3, frames, 16, 24) * 2 - 1
    expected = chunked.encode(video).latent_dist
    z = expected.mode().detach()
    sums = []
    for vae, own in ((chunked, expected), (whole, posterior(whole, video))):
        torch.testing.assert_close(own.parameters, expected.parameters, atol=1e-5, rtol=1e-4)
        made = chunked.decode(z).sample if vae is chunked else reconstruction(whole, z).clamp(-1, 1)
        (made.square().mean() + own.parameters.square().mean()).backward(retain_graph=True)
        sums.append(made)
    torch.testing.assert_close(*sums, atol=1e-5, rtol=1e-4)
    for expected_weight, weight in zip(chunked.parameters(), whole.parameters()):
        if expected_weight.grad is not None or weight.grad is not None:
            torch.testing.assert_close(weight.grad, expected_weight.grad, atol=1e-5, rtol=1e-3)


def test_loss_sees_blurred_edges_and_each_clip_alone():
    vae = AutoencoderKLWan(base_dim=4, z_dim=4)
    take_whole_clips(vae)
    original = torch.zeros(2, 3, 5, 16, 16)
    original[..., 8:] = 1
    shifted = original + 0.1
    with torch.no_grad():
        distribution = posterior(vae, original)
    assert vae_loss(shifted, original, distribution, LossSettings(squares=0.0, edges=1.0, kl=0.0)) == pytest.approx(
        0.1, abs=1e-6
    )
    stepped = original.clone()
    stepped[1, ..., 8:] += 0.2
    plain, edged = (
        vae_loss(stepped, original, distribution, LossSettings(squares=0.0, edges=edges, kl=0.0))
        for edges in (0.0, 1.0)
    )
    assert plain[1] == pytest.approx(0.1, abs=1e-6) and edged[1] > plain[1] + 0.01 and edged[0] == 0
    divergence = vae_loss(original, original, distribution, LossSettings(kl=1.0))
    mean, variance = distribution.mean, distribution.var
    expected = 0.5 * (mean.square() + variance - 1 - variance.log()).flatten(1).mean(1)
    torch.testing.assert_close(divergence, expected)


def test_batches_are_functions_of_seed_and_step(tmp_path):
    settings = VaeSettings.from_dict(vae_settings_dict(tmp_path))
    pools, again = VideoPools(settings, CPU), VideoPools(replace(settings, workers=2), CPU)
    assert {pools.batch(step).videos.shape for step in range(8)} == {(2, 3, 5, 32, 32), (3, 3, 1, 32, 16)}
    for step in (3, 1):
        one, other = pools.batch(step), again.batch(step)
        assert torch.equal(one.videos, other.videos) and one[1:] == other[1:]
    numbers = {number for step in range(40) for number in pools.batch(step).numbers}
    assert numbers == set(range(9))
    other_seed = VideoPools(VaeSettings.from_dict(vae_settings_dict(tmp_path, seed=1)), CPU)
    assert any(
        pools.batch(s).videos.shape != other_seed.batch(s).videos.shape
        or not torch.equal(pools.batch(s).videos, other_seed.batch(s).videos)
        for s in range(8)
    )


def test_processes_share_a_batch(tmp_path):
    cuts = [{"batch": 4, "size": "16*16", "frames": 1, "drawn": "32*32", "clips": 3}]
    settings = VaeSettings.from_dict(vae_settings_dict(tmp_path, cuts=cuts))
    whole = VideoPools(settings, CPU).batch(0)
    own = [VideoPools(settings, CPU, rank, 2).batch(0) for rank in range(2)]
    assert torch.equal(torch.stack([own[0].videos, own[1].videos], 1).flatten(0, 1), whole.videos)
    assert own[0].numbers == own[1].numbers == [whole.numbers[n] for n in (0, 2, 1, 3)]
    assert own[0].noise != own[1].noise
    with pytest.raises(InputError, match="a batch of 4 cannot be shared by 3 processes"):
        VideoPools(settings, CPU, 0, 3)


@pytest.mark.gpu
def test_a_compiled_step_is_the_same(tmp_path):
    cuts = [{"batch": 2, "size": "16*16", "frames": 5, "clips": 2}]
    runs = [tmp_path / "eager", tmp_path / "compiled"]
    for run in runs:
        small = {"cuts": cuts, "steps": 2, "statistics_clips": 1, "validation": {"every": 2, "clips": 1}}
        train(vae_settings_dict(run, compile=run.name == "compiled", **small))
    eager, compiled = (exact_rows(run) for run in runs)
    for one, other in zip(eager, compiled):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-3)


def test_steps_lower_the_loss(tmp_path):
    small = {
        "cuts": [{"batch": 4, "size": "16*16", "frames": 5, "clips": 40}],
        "video_frames": 5,
        "statistics_clips": 2,
        "precision": "bfloat16",
    }
    assert train(vae_settings_dict(tmp_path / "run", steps=16, validation={"every": 16}, **small))
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / METRICS_FILE) if "loss" in row]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_a_cut_run_goes_on_exactly(whole_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert not train(vae_settings_dict(run), minutes=0)
    assert exact_rows(run) == []

    class Asked(vae_training.VaeTrainer):
        def _step(self, batches):
            self.signal.asked = self.step == 1
            return super()._step(batches)

    with pytest.raises(Stopped, match="step 2"):
        Asked(VaeSettings.from_dict(vae_settings_dict(run))).run()
    # What was logged after the last state, before the run was killed, is done again.
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')
    (run / ".partial-state.pt").write_bytes(b"half a state")
    assert train(vae_settings_dict(run, workers=2))
    assert exact_rows(run) == exact_rows(whole_run)
    ends = [AutoencoderKLWan.from_pretrained(folder / "vae").state_dict() for folder in (run, whole_run)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    with pytest.raises(InputError, match="choose another out"):
        train(vae_settings_dict(run, seed=5))


def test_the_result_loads_in_diffusers_and_here(whole_run):
    theirs = AutoencoderKLWan.from_pretrained(whole_run / "vae")
    ours = vae_component(open_components(whole_run)).load(torch.float32, "cpu")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    last = read_metrics(whole_run / METRICS_FILE)[-1]
    assert last["step"] == 6 and {"psnr_32*32", "least_psnr_16*16"} <= last.keys() and last["weights_mb"] < 2
    assert (whole_run / "reconstructions.png").stat().st_size > 1000


def test_a_run_may_start_from_the_weights_of_another(whole_run, tmp_path):
    trainer = VaeTrainer(VaeSettings.from_dict(vae_settings_dict(tmp_path / "run", start=str(whole_run / "vae"))))
    written = AutoencoderKLWan.from_pretrained(whole_run / "vae").state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in trainer.vae.state_dict().items())


def test_a_decoder_alone_learns_for_the_latents_that_there_are(whole_run, tmp_path):
    run = tmp_path / "run"
    train(vae_settings_dict(run, start=str(whole_run / "vae"), decoder_only=True))
    before, after = (AutoencoderKLWan.from_pretrained(folder / "vae") for folder in (whole_run, run))
    changed = {n.split(".")[0] for n, x in after.state_dict().items() if not torch.equal(x, before.state_dict()[n])}
    assert changed == {"decoder", "post_quant_conv"}
    assert after.config.latents_mean == pytest.approx(before.config.latents_mean)
    assert after.config.latents_std == pytest.approx(before.config.latents_std)


def test_statistics_normalise_latents(whole_run):
    settings = VaeSettings.from_dict(read_settings(whole_run / "settings.yaml"))
    vae = AutoencoderKLWan.from_pretrained(whole_run / "vae")
    with torch.no_grad():
        videos = (vae_training.as_input(v, CPU) for v in vae_training.statistics_videos(settings))
        encoded = torch.cat([latents.encode(vae, video) for video in videos])
    channels = encoded.movedim(1, 0).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(channels.std(1), torch.ones(4), atol=1e-2, rtol=0)
    assert vae.config.latents_std != [1.0] * 4


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = VaeTrainer(VaeSettings.from_dict(vae_settings_dict(tmp_path / "run")))
    with torch.no_grad():
        trainer.weights[0].fill_(math.nan)
    with pytest.raises(Diverged, match=r"step 1: .* at item \d"):
        trainer.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"cuts": []}, "not a list"),
        ({"cuts": [{"batch": 1, "size": "32*32", "frames": 9}]}, "do not fit in videos of 5"),
        ({"cuts": [{"batch": 1, "size": "32*32", "frames": 5, "drawn": "16*16"}]}, "smaller"),
        ({"cuts": [{"batch": 1, "size": "32*32", "frames": 5, "clips": 0}]}, "clips"),
        ({"matrix_lr": 0}, "matrix_lr"),
        ({"compile": "yes"}, "compile 'yes' is neither true nor false"),
        ({"vae": {"base_size": 4}}, "AutoencoderKLWan"),
        ({"vae": {"base_dim": 4, "patch_size": 2}}, "strides"),
        ({"vae": {"base_dim": 0}}, "vae: base_dim 0 is not a positive integer"),
        ({"vae": {"base_dim": 4, "z_dim": 0}}, "vae: z_dim 0 is not a positive integer"),
        ({"vae": {"base_dim": 4, "dim_mult": [1, 2, 4, 0]}}, "vae: dim_mult [1, 2, 4, 0] is not a list of positive"),
        ({"vae": {"base_dim": 4, "in_channels": 4}}, "vae: in_channels 4 must be 3"),
        ({"seed": 10**23}, "seed 100000000000000000000000 is not a whole number from 0 to 2^63-1"),
        ({"precision": "float8"}, "float8"),
        ({"checkpoint": "x"}, "unknown key"),
        ({"start": "nowhere"}, "start nowhere is not the folder of a VAE"),
        ({"decoder_only": True}, "decoder_only True must be true or false, and true beside a start alone"),
    ),
)
def test_settings_that_do_not_fit_are_named(tmp_path, changes, message, capsys):
    program = runpy.run_path(str(ROOT / "scripts" / "train_vae.py"))["main"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(vae_settings_dict(tmp_path / "run") | changes))
    assert program(["--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_the_committed_config_is_whole():
    settings = VaeSettings.from_dict(with_overrides(read_settings(CONFIG_FOLDER / "training" / "shapes_vae.yaml"), []))
    assert VaeSettings.from_dict(settings.to_dict()) == settings
    assert settings.validation.sizes[0] == (256, 256) and settings.video_frames == 33
