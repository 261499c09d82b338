"""Kandinsky-5's transformer against what the reference program computes, and against itself in other ways."""

from __future__ import annotations

import copy

import kandinsky_set
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from kandinsky_set import expected, velocity

import nabla
import wan
from nabla import NablaConfig
from nabla.rotary import rotate
from nabla.tiling import TileLayout
from nabla.window import window_mask
from wan.attention.apply import apply_attention, remove_attention
from wan.attention.compile import compile_blocks
from wan.models.kandinsky.geometry import rope_scale
from wan.models.kandinsky.processor import TRANSFORMER, install_processors, velocity_of

GRID = (5, 16, 16)
ALGORITHMS = ("nabla-0.9_sta-3-1-1", "nabla-0.6_sta-1-1-3")


@pytest.fixture(scope="module")
def model_and_text():
    return kandinsky_set.transformer()


@pytest.fixture
def model(model_and_text):
    yield model_and_text[0]
    remove_attention(model_and_text[0])
    model_and_text[1].rows = None


@pytest.fixture
def text_mask(model_and_text):
    return model_and_text[1]


def padded(rows: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    """The set's text with rows of other numbers behind it, and which rows are its own."""
    text = expected()["dit.text"][None]
    length = text.shape[1]
    return F.pad(text, (0, 0, 0, rows), value=1.0), torch.arange(length + rows)[None] < length


@pytest.mark.parametrize("algorithm", ("nabla-0.2", "nabla-0.5", "nabla-0.9", *ALGORITHMS))
def test_masks_of_given_q_and_k(algorithm):
    layout = TileLayout.build(GRID, (1, 8, 8), "cpu")
    q, k = (layout.to_raster(expected()[f"mask.{name}"]) for name in "qk")
    blocks = nabla.select_blocks(q, k, GRID, NablaConfig.parse(algorithm))
    assert torch.equal(blocks, expected()[f"mask.only.{algorithm}"].bool())


@pytest.mark.parametrize("window", ("1-3-1", "11-3-3", "3-1-1", "3-1-3"))
def test_windows(window):
    blocks = window_mask((5, 2, 2), tuple(map(int, window.split("-"))), "cpu")
    assert torch.equal(blocks, expected()[f"mask.window.{window}"].bool())


def test_dense_forwards(model):
    assert relative_error(velocity(model), expected()["dit.dense"]) < 1e-5
    wide = velocity(model, scale=(1.0, 3.16, 3.16))
    assert relative_error(wide, expected()["dit.scale_3.16.dense"]) < 1e-5


def test_a_forward_with_the_first_frame_given(model):
    """The model sees the picture in place of the noise, and the velocity there leads straight to it."""
    latents = expected()["dit.latents"].movedim(-1, 0)[None]
    noisy = torch.cat((torch.randn_like(latents[:, :, :1]), latents[:, :, 1:]), dim=2)
    out = velocity(model, latents=noisy, first_frame=latents[:, :, :1])
    assert relative_error(out[1:], expected()["dit.first_frame.dense"][1:]) < 1e-5
    sigma = expected()["dit.timestep"] / 1000
    end = noisy[0].movedim(0, -1)[:1] - sigma * out[:1]
    torch.testing.assert_close(end, expected()["dit.latents"][:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_sparse_forward_and_its_masks(model, algorithm, chosen_blocks):
    apply_attention([model], NablaConfig.parse(algorithm), TRANSFORMER)
    assert relative_error(velocity(model), expected()[f"dit.{algorithm}"]) < 1e-5
    assert torch.equal(torch.cat(chosen_blocks), expected()[f"mask.{algorithm}"].bool())


@pytest.mark.parametrize("algorithm", ("dense", ALGORITHMS[0]))
def test_padded_text_equals_text_alone(model, text_mask, algorithm):
    apply_attention([model], NablaConfig.parse(algorithm), TRANSFORMER)
    alone = velocity(model)
    text, text_mask.rows = padded()
    assert relative_error(velocity(model, text=text), alone) < 5e-7
    text_mask.rows = None
    assert relative_error(velocity(model, text=text), alone) > 1e-3


def test_a_batch_of_texts_of_unequal_length_equals_each_alone(model, text_mask):
    latents, given = expected()["dit.latents"].movedim(-1, 0)[None], expected()
    short = F.pad(given["loop.null_text"][None], (0, 0, 0, 12))
    text_mask.rows = torch.stack((torch.ones(19, dtype=torch.bool), torch.arange(19) < 7))
    both = velocity_of(
        model,
        torch.cat((latents, latents)),
        given["dit.timestep"].expand(2),
        torch.cat((given["dit.text"][None], short)),
        torch.cat((given["dit.pooled"], given["loop.null_pooled"])),
        kandinsky_set.SCALE,
    )
    text_mask.rows = None
    alone = velocity(model, text=given["loop.null_text"][None], pooled=given["loop.null_pooled"])
    assert relative_error(both[0].movedim(0, -1), velocity(model)) < 1e-6
    assert relative_error(both[1].movedim(0, -1), alone) < 1e-6


@pytest.mark.parametrize("size", ((2, 6, 10), (3, 18, 22), (1, 4, 2)))
def test_threshold_one_equals_dense_on_grids_that_no_tile_divides(model, size):
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    dense = velocity(model, latents=latents)
    apply_attention([model], NablaConfig(threshold=1.0), TRANSFORMER)
    assert relative_error(velocity(model, latents=latents), dense) < 1e-5


def test_a_sparse_forward_equals_one_with_the_same_blocks_masked_token_by_token(model, monkeypatch):
    size, config = (3, 18, 22), NablaConfig(threshold=0.5, window=(1, 1, 1))
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    apply_attention([model], config, TRANSFORMER)
    sparse = velocity(model, latents=latents)

    def by_tokens(q, k, v, plan, rotary, *_):
        q, k = rotate(q, rotary), rotate(k, rotary)
        frames, rows, columns = (torch.arange(n) for n in plan.grid)
        down, across = -(-plan.grid[1] // 8), -(-plan.grid[2] // 8)
        block = (frames[:, None, None] * down + rows[:, None] // 8) * across + columns // 8
        kept = nabla.select_blocks(q, k, plan.grid, plan.config)[:, :, block.flatten()][..., block.flatten()]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~kept, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr(nabla, "attend", by_tokens)
    assert relative_error(velocity(model, latents=latents), sparse) < 1e-6


def test_attention_is_put_in_and_taken_out_of_diffusers_own_model_to_the_bit():
    model = kandinsky_set.plain_transformer()
    before = velocity(model)
    wan.apply_attention(model, NablaConfig.parse(ALGORITHMS[1]))
    assert relative_error(velocity(model), before) > 1e-3
    copied = copy.deepcopy(model)
    wan.remove_attention(model)
    assert torch.equal(velocity(model), before) and not torch.equal(velocity(copied), before)


def test_dense_layers_and_steps_run_what_was_there_before(model):
    dense = velocity(model)
    apply_attention([model], NablaConfig(threshold=0.3, dense_layers=(0, 1, 2)), TRANSFORMER)
    assert torch.equal(velocity(model), dense)
    apply_attention([model], NablaConfig(threshold=0.3, dense_steps=1), TRANSFORMER)
    assert torch.equal(velocity(model), dense)
    assert not torch.equal(velocity(model, timestep=torch.tensor([400.0])), dense)


@torch.no_grad()
def test_compiled_blocks_are_one_graph_for_steps_layers_and_prompts(monkeypatch):
    model = kandinsky_set.plain_transformer()
    mask = install_processors(model)
    config = NablaConfig(threshold=0.5, window=(1, 1, 1), backend="reference")
    apply_attention([model], config, TRANSFORMER)
    text, rows = padded()
    exact = []
    for timestep, length in ((900.0, 19), (500.0, 7)):
        mask.rows = rows & (torch.arange(32) < length)
        exact.append(velocity(model, text=text, timestep=torch.tensor([timestep])))
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    compile_blocks(model.visual_transformer_blocks)
    before = graphs["unique_graphs"]
    for (timestep, length), want in zip(((900.0, 19), (500.0, 7)), exact):
        mask.rows = rows & (torch.arange(32) < length)
        assert relative_error(velocity(model, text=text, timestep=torch.tensor([timestep])), want) < 1e-6
    assert graphs["unique_graphs"] - before == 1


def test_the_rotary_scale_goes_by_the_longer_side():
    assert rope_scale((256, 256)) == rope_scale((854, 480)) == rope_scale((512, 768)) == (1.0, 2.0, 2.0)
    assert rope_scale((1280, 768)) == rope_scale((640, 1408)) == rope_scale((1024, 1024)) == (1.0, 3.16, 3.16)
