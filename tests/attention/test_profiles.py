"""What layers keep by stretch of steps, and steps and layers by share, in transformers and in whole runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_apply_attention import tiny_transformer
from torch._dynamo.testing import CompileCounter

import nabla
import wan
from nabla import InputError, KeepProfile, NablaConfig, Stretch
from wan.attention.schedule import Schedule

GRID, TILE = (3, 6, 5), (1, 2, 2)
PROFILE = KeepProfile(
    (Stretch(0.25, (1.0, 1.0, 1.0)), Stretch(0.5, (1.0, 0.3, 0.5)), Stretch(1.0, (0.2, 0.3, 1.0))), {"layers": 3}
)
CONFIG = NablaConfig(profile=PROFILE, tile=TILE)


def forward(transformer, timestep: float = 500.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 16, 3, 12, 10, generator=draw), torch.randn(1, 512, 32, generator=draw)
    with torch.no_grad():
        return transformer(latents, torch.tensor([timestep]), text, return_dict=False)[0]


def at_step(transformer, step: int, steps: int) -> torch.Tensor:
    transformer.nabla.steps.set_step(step, steps)
    return forward(transformer, 1000.0 - step)


def by_hand(shares: tuple[float, ...], timestep: float, **changes) -> torch.Tensor:
    """A forward of layers with a plan each, put in by hand."""
    transformer = tiny_transformer(0, num_layers=len(shares))
    wan.apply_attention(transformer, NablaConfig(keep=0.5, tile=TILE))
    configs = [None if share == 1 else NablaConfig(keep=share, tile=TILE, **changes) for share in shares]

    def give(*_) -> None:
        for layer, config in zip(transformer.nabla.layers, configs):
            layer.plan = None if config is None else nabla.plan(GRID, config, "cpu", torch.float32, 12)

    transformer.blocks[0].register_forward_pre_hook(give)
    return forward(transformer, timestep)


@pytest.mark.parametrize("changes", ({}, {"pool": (1, 1, 1)}, {"window": (1, 3, 1)}))
def test_each_layer_keeps_its_share_in_each_stretch(changes):
    transformer = tiny_transformer(0, num_layers=3)
    wan.apply_attention(transformer, replace(CONFIG, **changes))
    for step, stretch in enumerate((0, 0, 1, 1, 2, 2, 2, 2)):
        wanted = by_hand(PROFILE.stretches[stretch].keep, 1000.0 - step, **changes)
        assert torch.equal(at_step(transformer, step, 8), wanted)
    wan.remove_attention(transformer)
    assert torch.equal(forward(transformer), by_hand((1, 1, 1), 500.0))


def test_layers_and_stretches_of_equal_shares_have_one_plan():
    transformer = tiny_transformer(0, num_layers=3)
    wan.apply_attention(transformer, CONFIG)
    for step in range(8):
        at_step(transformer, step, 8)
    # Of shares 0.2, 0.3 and 0.5: layer 1 keeps its plan from stretch to stretch.
    assert len(transformer.nabla.plans.by_size) == 3
    alike = KeepProfile((Stretch(0.5, (0.3, 0.3, 0.3)), Stretch(1.0, (0.3, 0.3, 0.2))))
    wan.apply_attention(transformer, NablaConfig(profile=alike, tile=TILE))
    at_step(transformer, 0, 2)
    assert len({layer.plan for layer in transformer.nabla.layers}) == 1


@pytest.mark.parametrize("refresh, graphs", ((1, 2), (2, 3)))
def test_one_graph_serves_all_layers_stretches_and_shares(refresh, graphs):
    transformer = tiny_transformer(0, num_layers=3)
    counter = CompileCounter()
    for block in transformer.blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=False)
    wan.apply_attention(transformer, replace(CONFIG, mask_refresh=refresh))
    for step in range(8):
        at_step(transformer, step, 8)
    # Of dense layers and of sparse ones, and where masks are kept of those that take them.
    assert counter.frame_count == graphs
    other = KeepProfile((Stretch(0.4, (0.1, 0.6, 1.0)), Stretch(1.0, (0.9, 0.4, 0.15))))
    wan.apply_attention(transformer, replace(CONFIG, profile=other, mask_refresh=refresh))
    for step in range(8):
        at_step(transformer, step, 8)
    wan.apply_attention(transformer, NablaConfig(keep=0.7, tile=TILE, dense_steps=0.2, mask_refresh=refresh))
    for step in range(8):
        at_step(transformer, step, 8)
    assert counter.frame_count == graphs


def test_masks_are_chosen_anew_where_a_stretch_begins():
    transformer, seen = tiny_transformer(0, num_layers=3), []
    wan.apply_attention(transformer, replace(CONFIG, mask_refresh=3))
    layers, fresh = transformer.nabla.layers, []
    for step in range(8):
        # Twice, as of two guidance branches.
        for _ in range(2):
            out = at_step(transformer, step, 8)
        fresh.append(torch.equal(out, by_hand(PROFILE.stretch_at(step, 8).keep, 1000.0 - step)))
        seen.append([None if one.block_mask is None else one.block_mask.reuse for one in layers])
    # Steps 0 and 1 are dense, the second stretch begins at 2 and the last at 4. Afterwards all are of one forward.
    none, kept = [None] * 3, True
    assert seen == [none, none] + [[None, kept, kept]] * 2 + [[kept, kept, None]] * 4
    assert fresh == [True, True, True, False, True, False, False, True]


def test_masks_of_one_layer_are_not_taken_under_another_share():
    """Of stretches of which but one layer's share changes."""
    profile = KeepProfile((Stretch(0.5, (0.3, 0.3)), Stretch(1.0, (0.3, 0.6))))
    transformer = tiny_transformer(0, num_layers=2)
    wan.apply_attention(transformer, NablaConfig(profile=profile, tile=TILE, mask_refresh=4))
    at_step(transformer, 0, 2)
    assert torch.equal(at_step(transformer, 1, 2), by_hand((0.3, 0.6), 999.0))


def test_shares_need_a_loop_that_says_how_many_steps_there_are():
    transformer = tiny_transformer(0, num_layers=3)
    for config in (NablaConfig(keep=0.3, tile=TILE, dense_steps=0.2), CONFIG):
        wan.apply_attention(transformer, config)
        with pytest.raises(InputError, match="nothing here says .*; (give a whole number|sample with a pipeline)"):
            forward(transformer)
    # One stretch is for any number of steps.
    wan.apply_attention(transformer, replace(CONFIG, profile=KeepProfile(PROFILE.stretches[2:])))
    assert torch.equal(forward(transformer), by_hand(PROFILE.stretches[2].keep, 500.0))


def test_training_runs_what_comes_after_the_dense_steps():
    transformer = tiny_transformer(0, num_layers=3)
    for config in (replace(CONFIG, mask_refresh=2), NablaConfig(keep=0.3, tile=TILE, dense_steps=0.5)):
        wan.apply_attention(transformer, config)
        shares = PROFILE.stretches[-1].keep if config.profile else (0.3,) * 3
        trained = forward(transformer.train())
        assert torch.equal(trained, by_hand(shares, 500.0))


def test_the_first_layers_by_share():
    transformer = tiny_transformer(0, num_layers=3)
    for share, first in ((0.3, 1), (0.34, 2), (0.9, 3)):
        wan.apply_attention(transformer, NablaConfig(keep=0.3, tile=TILE, dense_layers=share))
        assert torch.equal(forward(transformer), by_hand((1.0,) * first + (0.3,) * (3 - first), 500.0))


def test_a_profile_of_other_layers_changes_no_transformer():
    transformer = tiny_transformer(0, num_layers=2)
    wan.apply_attention(transformer, NablaConfig(keep=0.5, tile=TILE))
    before, line = forward(transformer), "profile has shares of 3 layers, and this transformer has 2"
    with pytest.raises(InputError, match=line):
        wan.apply_attention(transformer, CONFIG)
    assert torch.equal(forward(transformer), before)


def test_layers_that_are_dense_in_all_stretches_stay_diffusers_own():
    schedule = Schedule(NablaConfig(profile=KeepProfile((Stretch(0.5, (1.0, 0.5)), Stretch(1.0, (1.0, 1.0))))), 2)
    assert schedule.sparse_layers == [1] and schedule.by_step
    transformer, dense = tiny_transformer(0, num_layers=2), forward(tiny_transformer(0, num_layers=2))
    wan.apply_attention(transformer, NablaConfig(profile=KeepProfile((Stretch(1.0, (1.0, 1.0)),))))
    assert transformer.nabla.patched == [] and torch.equal(forward(transformer), dense)


@pytest.fixture(scope="module")
def pipe(random_nano):
    return wan.WanT2V.from_pretrained(random_nano)


def sample(pipe, config: NablaConfig, steps: int = 4) -> torch.Tensor:
    wan.apply_attention(pipe.transformer, config)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 2, 12, 10, generator=draw)
    texts = torch.randn(2, 7, pipe.transformer.config.text_dim, generator=draw).split(1)
    return pipe.sample(*texts, noise=noise, steps=steps)


@pytest.mark.parametrize("cache", (None, "first_block:1e9"))
def test_runs_by_share_and_by_profile_are_those_by_number(random_nano, cache):
    pipe = wan.WanT2V.from_pretrained(random_nano, cache=cache)
    layers, plain = len(pipe.transformer.blocks), NablaConfig(keep=0.3, tile=TILE)
    exact = sample(pipe, replace(plain, dense_steps=2))
    assert torch.equal(sample(pipe, replace(plain, dense_steps=0.3)), exact)
    stretches = Stretch(0.3, (1.0,) * layers), Stretch(1.0, (0.3,) * layers)
    assert torch.equal(sample(pipe, NablaConfig(profile=KeepProfile(stretches), tile=TILE)), exact)
    assert not torch.equal(sample(pipe, plain), exact)


def test_what_runs_is_said(pipe):
    layers = len(pipe.transformer.blocks)
    stretches = Stretch(0.25, (1.0,) * layers), Stretch(1.0, (0.2,) * layers)
    video = wan.config.settings.VideoSettings((96, 80), 5)
    config = NablaConfig(profile=KeepProfile(stretches), tile=TILE, pool=(1, 1, 1))
    wan.apply_attention(pipe.transformer, config)
    what = f"{layers} layers, 2 stretches of steps, 40.0% of blocks in the mean"
    assert pipe.describe_attention(video).startswith(f"{config.algorithm} ({what}), backend gather, grid 2x5x6")
    wan.apply_attention(pipe.transformer, NablaConfig(keep=0.2, tile=TILE, dense_steps=0.2, dense_layers=0.3))
    said = pipe.describe_attention(video)
    assert said.startswith("keep-0.2, first 0.2 of the steps dense, first 0.3 of the layers dense, backend gather")
