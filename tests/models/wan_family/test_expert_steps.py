"""Two experts of a video: which runs when, with which guidance, and what one leaves to the other, which is nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import wan
from nabla import InputError, NablaConfig
from wan.config.model_settings import LoraFile
from wan.config.settings import SamplingSettings, VideoSettings
from wan.models.wan.random_checkpoint import random_transformer
from wan.sampling.experts import experts_of
from wan.sampling.solvers import make_solver

CPU = torch.device("cpu")
SPARSE = NablaConfig(threshold=0.4)
# Of six steps at shift 12, four are at least 875 of 1000.
STEPS, SHIFT, HIGH = 6, 12.0, 4


@pytest.fixture
def pipe():
    transformers = [random_transformer("nano", torch.float32, CPU, seed) for seed in (1, 2)]
    sampling, video = SamplingSettings(), VideoSettings((128, 128), 5)
    made = wan.WanT2V(
        *(transformers[0], None, None, None, CPU, CPU, 512, False, sampling, video),
        transformer_2=transformers[1],
        boundary=0.875,
    )
    wan.apply_attention(made.transformers, SPARSE)
    return made


def inputs(pipe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(2, 7, pipe.transformer.config.text_dim, generator=generator).split(1)
    return *texts, torch.randn(1, 16, 2, 16, 16, generator=generator)


def sample(pipe, **changes) -> torch.Tensor:
    *texts, noise = inputs(pipe)
    return pipe.sample(*texts, **dict(noise=noise, steps=STEPS, shift=SHIFT, guide_scale=(3.0, 4.0)) | changes)


@torch.no_grad()
def sample_by_hand(pipe, scales: dict[str, float], dense_steps: int = 0) -> torch.Tensor:
    """The obvious walk: each step asks its timestep which expert and which scale it has."""
    context, negative, latents = inputs(pipe)
    solver = make_solver("unipc", STEPS, SHIFT)
    pad = nn.ZeroPad2d((0, 0, 0, 512 - context.shape[1]))
    for step, timestep in enumerate(solver.timesteps):
        name, model = ("high", pipe.transformer) if timestep >= 875 else ("low", pipe.transformer_2)
        wan.apply_attention(model, NablaConfig() if step < dense_steps else SPARSE)
        on, off = (model(latents, timestep[None], pad(text), return_dict=False)[0] for text in (context, negative))
        latents = solver.step(off + scales[name] * (on - off), timestep, latents, return_dict=False)[0]
    wan.apply_attention(pipe.transformers, SPARSE)
    return latents


def ran(pipe) -> list[str]:
    """The experts of the forwards to come, in order."""
    seen: list[str] = []
    for name, model in zip(("high", "low"), pipe.transformers):
        model.register_forward_hook(lambda *_, name=name: seen.append(name))
    return seen


def test_each_step_runs_the_expert_of_its_timestep_with_its_guidance(pipe):
    exact = sample_by_hand(pipe, {"high": 4.0, "low": 3.0})
    seen = ran(pipe)
    assert torch.equal(sample(pipe), exact)
    assert seen == ["high"] * 2 * HIGH + ["low"] * 2 * (STEPS - HIGH)
    # Another video begins with the first expert again, and forwards between videos are its.
    assert pipe.running is pipe.transformer and torch.equal(sample(pipe), exact)
    assert not torch.equal(sample(pipe, guide_scale=(4.0, 3.0)), exact)


def test_one_scale_is_that_of_both(pipe):
    assert torch.equal(sample(pipe, guide_scale=3.0), sample(pipe, guide_scale=(3.0, 3.0)))


@pytest.mark.parametrize("scales, forwards", (((1.0, 4.0), (8, 2)), ((3.0, 1.0), (4, 4)), (1.0, (4, 2))))
def test_a_step_without_guidance_runs_once(pipe, scales, forwards):
    low, high = scales if isinstance(scales, tuple) else (scales, scales)
    exact = sample_by_hand(pipe, {"high": high, "low": low})
    seen = ran(pipe)
    assert torch.allclose(sample(pipe, guide_scale=scales), exact, atol=1e-5)
    assert (seen.count("high"), seen.count("low")) == forwards


def test_branches_as_one_batch_are_one_forward_a_step(pipe, monkeypatch):
    exact, seen = sample(pipe), ran(pipe)
    monkeypatch.setattr("wan.models.wan.memory.has_room_for_both", lambda transformer, latents: True)
    assert torch.allclose(sample(pipe), exact, atol=1e-4) and len(seen) == STEPS


@pytest.mark.parametrize("dense_steps, first", ((2, 2), (5, 5), (4.5 / STEPS, 5)))
def test_dense_steps_are_counted_over_both(pipe, dense_steps, first):
    exact = sample_by_hand(pipe, {"high": 4.0, "low": 3.0}, first)
    wan.apply_attention(pipe.transformers, replace(SPARSE, dense_steps=dense_steps))
    assert torch.equal(sample(pipe), exact)


def test_experts_that_were_given_attention_apart_are_both_told_the_step(pipe):
    config = replace(SPARSE, dense_steps=5)
    wan.apply_attention(pipe.transformers, config)
    together = sample(pipe)
    for model in pipe.transformers:
        wan.apply_attention(model, config)
    assert torch.equal(sample(pipe), together)


def test_each_expert_keeps_blocks_that_it_chose_itself(pipe):
    """Those of the first are of no step of the second, which chooses in its own first."""
    config, (context, negative, latents) = replace(SPARSE, mask_refresh=3), inputs(pipe)
    solver, pad = make_solver("unipc", STEPS, SHIFT), nn.ZeroPad2d((0, 0, 0, 512 - context.shape[1]))
    wan.apply_attention(pipe.transformers, config)
    kept = sample(pipe)
    for model in pipe.transformers:
        # Given alone, each counts its own steps.
        wan.apply_attention(model, config)
    with torch.no_grad():
        for step, timestep in enumerate(solver.timesteps):
            model, scale = (pipe.transformer, 4.0) if step < HIGH else (pipe.transformer_2, 3.0)
            on, off = (model(latents, timestep[None], pad(text), return_dict=False)[0] for text in (context, negative))
            latents = solver.step(off + scale * (on - off), timestep, latents, return_dict=False)[0]
    assert torch.equal(kept, latents)
    wan.apply_attention(pipe.transformers, SPARSE)
    assert not torch.equal(sample(pipe), kept)


def test_attention_leaves_no_trace_on_either(pipe):
    seen = []
    wan.remove_attention(pipe.transformers)
    dense = sample(pipe)
    for changes in ({"mask_refresh": 3}, {"dense_steps": 5}):
        wan.apply_attention(pipe.transformers, replace(SPARSE, **changes))
        seen.append(sample(pipe))
        wan.remove_attention(pipe.transformers)
        assert torch.equal(sample(pipe), dense)
    assert not any(torch.equal(dense, one) for one in seen)


def test_blocks_that_an_expert_kept_are_freed_as_it_goes(pipe):
    wan.apply_attention(pipe.transformers, replace(SPARSE, mask_refresh=3))
    kept = []

    def look(model, *_) -> None:
        kept.append([sum(layer.block_mask is not None for layer in one.nabla.sparse) for one in pipe.transformers])

    for model in pipe.transformers:
        model.register_forward_hook(look)
    sample(pipe)
    assert all(high > 0 == low for high, low in kept[: 2 * HIGH])
    assert all(low > 0 == high for high, low in kept[2 * HIGH :])
    assert all(layer.block_mask is None for one in pipe.transformers for layer in one.nabla.sparse)


@pytest.mark.parametrize(
    "solver, steps, shift, boundary, high",
    (
        ("unipc", 40, 12.0, 0.875, 26),
        ("unipc", 40, 5.0, 0.9, 15),
        ("unipc", 40, 3.0, 0.9, 10),
        # The timestep 900 itself is the high expert's.
        ("dpm++", 40, 3.0, 0.9, 11),
        ("euler", 4, 5.0, 0.875, 2),
        ("euler", 4, 5.0, 0.9, 2),
        ("unipc", 40, 12.0, None, 40),
    ),
)
def test_the_published_programs_switch_at_the_same_step(solver, steps, shift, boundary, high):
    numbers = experts_of(make_solver(solver, steps, shift).timesteps, boundary)
    assert numbers == [0] * high + [1] * (steps - high)


@pytest.mark.parametrize("number, name", ((0, "high"), (1, "low")))
def test_numbers_that_overflow_are_said_with_the_expert_they_are_of(pipe, number, name):
    pipe.transformers[number].proj_out.bias.fill_(math.nan)
    with pytest.raises(InputError, match=f"guide_scale 3,4; .*look at the weights of the {name}-noise expert") as error:
        sample(pipe)
    assert "\n" not in str(error.value) and pipe.running is pipe.transformer
    pipe.lora = LoraFile("a.safetensors", expert="high"), LoraFile("b.safetensors", expert="low")
    with pytest.raises(InputError) as error:
        sample(pipe)
    files = "a.safetensors" in str(error.value), "b.safetensors" in str(error.value)
    assert files == (number == 0, number == 1)


def test_an_expert_that_overflows_ends_the_video_in_its_first_step(pipe):
    pipe.transformer_2.proj_out.bias.fill_(math.nan)
    seen = ran(pipe)
    with pytest.raises(InputError, match="low-noise"):
        sample(pipe)
    assert seen.count("low") == 2


def test_what_is_given_is_put_back_before_the_first_step_and_after_each(pipe, monkeypatch):
    given, begun, clean = torch.full((1, 16, 1, 16, 16), 7.0), [], []

    def hold(latents, conditions):
        assert conditions.prompt is not None
        return torch.cat((given, latents[:, :, 1:]), dim=2)

    class Looks(wan.Observer):
        def step_ends(self, step: int, latents: torch.Tensor) -> None:
            clean.append(latents[:, :, :1].clone())

    monkeypatch.setattr(pipe, "hold", hold)
    for model in pipe.transformers:
        model.register_forward_pre_hook(lambda _, args, __: begun.append(args[0][:, :, :1].clone()), with_kwargs=True)
    latents = sample(pipe, observer=Looks())
    assert all(torch.equal(one, given) for one in (*begun, *clean, latents[:, :, :1])) and len(clean) == STEPS


def test_a_log_says_the_expert_of_each_step(pipe, tmp_path):
    recorder = wan.Recorder(tmp_path / "run.jsonl", examples=True)
    sample(pipe, observer=recorder)
    run, *others = json.loads(f"[{','.join((tmp_path / 'run.jsonl').read_text().splitlines())}]")
    steps = [event for event in others if event["kind"] == "step"]
    assert run["guide_scale"] == [3.0, 4.0] and run["layers"] == 2
    assert [step["expert"] for step in steps] == ["high"] * HIGH + ["low"] * (STEPS - HIGH)
    assert all(0 < step["kept"] < 1 and step["layers_run"] == 2 and step["forwards"] == 2 for step in steps)
    assert {one.step for one in recorder.examples} == {STEPS - 1}
    # What each is said to keep is what its own forwards choose.
    alone = wan.Recorder()
    sample(pipe, observer=alone, steps=HIGH, shift=100.0)
    assert {step["expert"] for step in alone.records if step["kind"] == "step"} == {"high"}


def test_a_pair_of_scales_needs_two_experts(pipe):
    pipe.transformer_2 = pipe.boundary = None
    with pytest.raises(InputError, match=r"guide_scale 3,4 is for a checkpoint of two experts, .* such as 4$"):
        sample(pipe)
