"""Wan's videos from pictures against what the published programs compute, in float32."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from conftest import relative_error
from wan_family_sets import checkpoint, expected, input_file, settings

import wan
from nabla import NablaConfig
from wan.files.picture import check_picture
from wan.models.wan.sizes import area_size, best_output_size
from wan.models.wan.text_image_to_video import token_timesteps

PICTURES = {
    "i2v": {"image": "image.png"},
    "flf2v": {"image": "first_frame.png", "last_image": "last_frame.png"},
    "wan22_i2v": {"image": "image.png"},
    "ti2v_5b": {"image": "image.png"},
}
ALGORITHMS = ("dense", "nabla-0.7")


@cache
def pipeline(task: str) -> wan.WanT2V:
    return wan.from_pretrained(checkpoint(task))


@cache
def condition(task: str) -> torch.Tensor:
    said = settings(task)
    given = {name: input_file(task, file) for name, file in PICTURES[task].items()}
    return pipeline(task).condition(**given, size=tuple(said["size"]), frame_num=said["frame_num"])


def sample(task: str, noise: torch.Tensor, conditions: torch.Tensor | None) -> torch.Tensor:
    given, said = expected(task), settings(task)
    walk = {name: said[name] for name in ("steps", "shift", "solver", "guide_scale")}
    if isinstance(walk["guide_scale"], list):
        walk["guide_scale"] = tuple(walk["guide_scale"])
    texts = given["dit.context"][None], given["dit.negative"][None]
    return pipeline(task).sample(*texts, noise=noise, conditions=conditions, **walk)


@pytest.mark.parametrize("task", PICTURES)
def test_sizes_and_what_stands_beside_the_noise(task):
    given, said, made = expected(task), settings(task), condition(task)
    picture = check_picture(input_file(task, PICTURES[task]["image"]))
    fits = best_output_size(picture, said["max_area"], (32, 32)), area_size(picture, said["max_area"])
    assert fits[task != "ti2v_5b"] == tuple(said["size"])
    exact = given["cond.first" if task == "ti2v_5b" else "cond.y"]
    assert (made.y - exact).abs().max() < 1e-5
    if "cond.clip" in given:
        assert (made.clip - given["cond.clip"]).abs().max() < 1e-5
    else:
        assert made.clip is None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("task", PICTURES)
def test_forwards_and_their_masks(task, algorithm, monkeypatch, chosen_blocks):
    given, pipe = expected(task), pipeline(task)
    wan.apply_attention(pipe.transformers, NablaConfig.parse(algorithm))
    texts = given["dit.context"][None].new_zeros(1, 512, 32)
    texts[:, : len(given["dit.context"])] = given["dit.context"]
    guidance = pipe.guide((texts,), condition(task))
    for transformer, name in zip(
        pipe.transformers, ("dit.high", "dit.low") if len(pipe.transformers) > 1 else ("dit",)
    ):
        chosen_blocks.clear()
        # Of a token of its own in the first frame, of the step's in the others.
        timestep = given[f"{name}.timestep"].flatten()[-1:]
        monkeypatch.setattr(pipe, "running", transformer)
        with torch.no_grad():
            velocity = pipe.predict(given["loop.noise"][None], timestep, guidance.prompt)[0]
        assert relative_error(velocity, given[f"{name}.{algorithm}"]) < 2e-6
        if algorithm == "dense":
            assert not chosen_blocks
        else:
            assert torch.equal(torch.cat(chosen_blocks), given[f"{name}.mask.{algorithm}"].bool())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("task", PICTURES)
def test_guided_loops_and_their_videos(task, algorithm):
    given, pipe = expected(task), pipeline(task)
    wan.apply_attention(pipe.transformers, NablaConfig.parse(algorithm))
    latents = sample(task, given["loop.noise"], condition(task))
    assert (latents - given[f"loop.{algorithm}"]).abs().max() < 1e-4
    video = pipe.decode(latents)[:, ::5, ::16, ::16]
    assert (video - given[f"loop.{algorithm}.video"]).abs().max() < 1e-4


def test_timesteps_of_tokens():
    given, grid = expected("ti2v_5b"), tuple(settings("ti2v_5b")["token_grid"])
    assert torch.equal(token_timesteps(given["loop.timesteps"][1:2], grid), given["cond.timesteps.1"])


def test_noise_in_the_first_frame_is_of_no_account():
    given, picture = expected("ti2v_5b"), condition("ti2v_5b")
    wan.apply_attention(pipeline("ti2v_5b").transformers, NablaConfig())
    noise = torch.cat((given["loop.drawn"], given["loop.noise"][:, 1:]), dim=1)
    assert torch.equal(sample("ti2v_5b", noise, picture), sample("ti2v_5b", given["loop.noise"], picture))


def test_without_a_picture_all_is_made_of_text():
    given = expected("ti2v_5b")
    wan.apply_attention(pipeline("ti2v_5b").transformers, NablaConfig())
    latents = sample("ti2v_5b", torch.cat((given["loop.drawn"], given["loop.noise"][:, 1:]), dim=1), None)
    assert (latents[:, -1:] - given["loop.text.dense.last_frame"]).abs().max() < 1e-4
