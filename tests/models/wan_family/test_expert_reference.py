"""Two experts against what the published programs of Wan2.2 compute, in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import relative_error
from wan_family_sets import TWO_EXPERTS, checkpoint, expected, settings

import wan
from nabla import NablaConfig
from wan.models.wan.condition import Condition

EXPERTS = ("high", "low")
SPARSE = NablaConfig(threshold=0.7)
# Dense steps are counted over both experts.
WALKS = {"dense": NablaConfig(), "nabla-0.7": SPARSE, "nabla-0.7.dense_steps_5": replace(SPARSE, dense_steps=5)}


@pytest.fixture(scope="module", params=TWO_EXPERTS)
def task(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(task):
    return wan.from_pretrained(checkpoint(task))


def latents_of(task: str) -> torch.Tensor:
    """(1, C, T, h, w) as the transformers take them: the noise, and what stands beside it."""
    found = expected(task)
    return torch.cat([found[key] for key in ("loop.noise", "cond.y") if key in found])[None]


@pytest.mark.parametrize("number, expert", enumerate(EXPERTS))
@pytest.mark.parametrize("algorithm", ("dense", "nabla-0.7"))
def test_forward_and_its_masks(pipe, task, number, expert, algorithm, chosen_blocks):
    found = expected(task)
    wan.apply_attention(pipe.transformers, NablaConfig.parse(algorithm))
    with torch.no_grad():
        inputs = latents_of(task), found[f"dit.{expert}.timestep"], found["dit.context"][None]
        velocity = pipe.transformers[number](*inputs, return_dict=False)[0][0]
    assert relative_error(velocity, found[f"dit.{expert}.{algorithm}"]) < 2e-5
    if algorithm == "dense":
        assert not chosen_blocks
        return
    assert torch.equal(torch.cat(chosen_blocks), found[f"dit.{expert}.mask.{algorithm}"].bool())


@pytest.mark.parametrize("walk", WALKS)
def test_walk(pipe, task, walk):
    made, found = settings(task), expected(task)
    if f"loop.{walk}" not in found:
        # Dense steps stand in one of the sets.
        assert walk.endswith("dense_steps_5") and task == "wan22_i2v"
        return
    wan.apply_attention(pipe.transformers, WALKS[walk])
    ran, hooks = [], []
    for name, one in zip(EXPERTS, pipe.transformers):
        hooks.append(one.register_forward_hook(lambda *_, name=name: ran.append(name)))
    latents = pipe.sample(
        found["dit.context"][None],
        found["dit.negative"][None],
        noise=found["loop.noise"],
        conditions=Condition.of(found["cond.y"]) if "cond.y" in found else None,
        **{name: made[name] for name in ("steps", "shift", "solver", "guide_scale")},
    )
    for hook in hooks:
        hook.remove()
    assert relative_error(latents, found[f"loop.{walk}"]) < 1e-4
    # Two forwards a step.
    assert ran[::2] == ran[1::2] == made["experts"]


def test_checkpoints_say_the_published_guidance_and_boundary(pipe, task):
    assert pipe.boundary == settings(task)["boundary"]
    assert pipe.sampling.steps == 40 and pipe.sampling.shift == settings(task)["shift"]
    low, high = settings(task)["guide_scale"]
    assert [pipe.sampling.guide_scale_of(number) for number in (0, 1)] == [high, low]
