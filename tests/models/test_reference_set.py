"""Against what the reference programs compute, in float32."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error

import nabla
import wan
from nabla import NablaConfig
from nabla.tiling import TileLayout
from nabla.window import window_mask
from wan.sampling.solvers import make_solver

GRID = (12, 16, 16)
ALGORITHMS = ("dense", "nabla-0.4", "nabla-0.7", "nabla-0.5_sta-5-1-3", "sta-5-3-1")


@pytest.fixture(scope="module")
def pipe(nano):
    return wan.WanT2V.from_pretrained(nano)


@pytest.mark.parametrize("threshold", ("0.1", "0.4", "0.7", "0.95"))
def test_masks_of_given_q_and_k(expected, threshold):
    layout = TileLayout.build(GRID, (1, 8, 8), "cpu")
    q, k = layout.to_raster(expected["mask.q"]), layout.to_raster(expected["mask.k"])
    blocks = nabla.select_blocks(q, k, GRID, NablaConfig.parse(f"nabla-{threshold}"))
    assert torch.equal(blocks, expected[f"mask.only.nabla-{threshold}"].bool())


@pytest.mark.parametrize("window", ("11-3-3", "11-5-5", "3-1-1", "5-1-3", "5-3-1"))
def test_windows(expected, window):
    blocks = window_mask((12, 2, 2), tuple(map(int, window.split("-"))), "cpu")
    assert torch.equal(blocks, expected[f"mask.window.{window}"].bool())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_forward_and_its_masks(pipe, expected, algorithm, chosen_blocks):
    wan.apply_attention(pipe.transformer, NablaConfig.parse(algorithm))
    with torch.no_grad():
        velocity = pipe.transformer(
            expected["dit.latents"][None], expected["dit.timestep"], expected["dit.context"][None], return_dict=False
        )[0][0]
    assert relative_error(velocity[:, :6], expected[f"dit.{algorithm}"]) < 2e-6
    if algorithm == "dense":
        assert not chosen_blocks
        return
    masks = expected[f"mask.{algorithm}"].bool()
    assert torch.equal(torch.cat(chosen_blocks), masks.expand(-1, 2, -1, -1))


@pytest.mark.parametrize("algorithm", ("dense", "nabla-0.7"))
def test_guided_loop(pipe, expected, algorithm):
    wan.apply_attention(pipe.transformer, NablaConfig.parse(algorithm))
    latents = pipe.sample(
        expected["dit.context"][None],
        expected["loop.negative"][None],
        noise=expected["loop.noise"],
        steps=6,
        shift=5.0,
        guide_scale=5.0,
        solver="unipc",
    )
    assert (latents - expected[f"loop.{algorithm}.latents"]).abs().max() < 1e-4


def test_one_batch_of_two_equals_two_forwards(pipe, expected, monkeypatch):
    wan.apply_attention(pipe.transformer, NablaConfig.parse("nabla-0.7"))
    monkeypatch.setattr("wan.models.wan.memory.has_room_for_both", lambda transformer, latents: True)
    test_guided_loop(pipe, expected, "nabla-0.7")


@pytest.mark.parametrize("solver", ("unipc", "dpm++"))
@pytest.mark.parametrize("steps, shift", ((50, 5.0), (8, 3.0)))
def test_solvers(expected, solver, steps, shift):
    made = make_solver(solver, steps, shift)
    prefix = f"solver.{solver}.{steps}.{shift}"
    assert torch.equal(made.sigmas, expected[f"{prefix}.sigmas"])
    assert torch.equal(made.timesteps, expected[f"{prefix}.timesteps"])
    x = expected["solver.noise"]
    for timestep in made.timesteps:
        x = made.step(torch.sin(3 * x) + timestep / 1000, timestep, x, return_dict=False)[0]
    # To the bit on the kind of processor that computed it; on others the steps carry on a sine's last bit.
    torch.testing.assert_close(x, expected[f"{prefix}.final"], atol=1e-5, rtol=0)


def test_text_encoder(pipe, expected):
    states = pipe.encode_text(expected["t5.ids"], expected["t5.mask"])
    assert states.shape == (2, 512, 64)
    for row, hidden in zip(states, (expected["t5.hidden.0"], expected["t5.hidden.1"])):
        assert (row[: len(hidden)] - hidden).abs().max() < 1e-5
        assert not row[len(hidden) :].any()


def test_vae_both_ways(pipe, expected):
    assert (pipe.decode(expected["vae.latents"]) - expected["vae.video"]).abs().max() < 1e-5
    assert (pipe.encode_video(expected["vae.input"]) - expected["vae.encoded"]).abs().max() < 1e-5
