"""VACE against what the published program computes on a tiny checkpoint, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import wan_family_sets as sets
from conftest import relative_error

import wan
from nabla import InputError, NablaConfig
from wan.files.source_video import SourceVideo
from wan.models.wan import components
from wan.models.wan.sizes import fit_source
from wan.models.wan.vace_condition import frames_taken

ALGORITHMS = ("dense", "nabla-0.7")


@pytest.fixture(scope="module")
def expected():
    return sets.expected("vace")


@pytest.fixture(scope="module")
def settings():
    return sets.settings("vace")


@pytest.fixture(scope="module")
def pipe():
    return wan.from_pretrained(sets.checkpoint("vace"))


@pytest.fixture(scope="module")
def given(settings):
    source = np.load(sets.input_file("vace", "source.npz"))
    return {
        "src_video": SourceVideo(source["video"], float(source["fps"])),
        "src_mask": source["mask"],
        "src_ref_images": [sets.input_file("vace", f"reference_{n}.png") for n in range(settings["references"])],
    }


@pytest.fixture(scope="module")
def condition(pipe, given, settings):
    form = {"size": tuple(settings["size"]), "frame_num": settings["frame_num"]}
    return pipe.condition(**given, **form, context_scale=settings["context_scale"])


def test_frames_and_size_are_those_of_the_source(given, settings):
    assert frames_taken(given["src_video"], 81) == settings["frame_ids"]
    assert fit_source(given["src_video"].size, (832, 480)) == tuple(settings["size"])


def test_the_context(condition, expected, settings):
    assert type(condition.y) is torch.Tensor
    assert (condition.references, condition.context_scale) == (settings["references"], settings["context_scale"])
    assert relative_error(condition[:32], expected["cond.latents"]) < 1e-5
    assert (condition[:32] - expected["cond.latents"]).abs().max() < 1e-5
    assert (condition[32::9] - expected["cond.mask.every_9th"]).abs().max() < 1e-5


def test_without_a_size_it_is_the_sources(pipe, given, condition, settings):
    # Of about the area of the default size, so that it is the source's own.
    assert torch.equal(pipe.condition(**given, context_scale=settings["context_scale"]), condition)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_forward_and_its_masks(pipe, condition, expected, settings, algorithm, chosen_blocks):
    wan.apply_attention(pipe.transformer, NablaConfig.parse(algorithm))
    with torch.no_grad():
        velocity = pipe.transformer(
            expected["loop.noise"][None],
            expected["dit.timestep"],
            expected["dit.context"][None],
            control_hidden_states=condition[None],
            control_hidden_states_scale=torch.full((2,), settings["context_scale"]),
            return_dict=False,
        )[0][0]
    assert relative_error(velocity, expected[f"dit.{algorithm}"]) < 2e-6
    if algorithm == "dense":
        assert not chosen_blocks
        return
    # VACE's own blocks, which run first, and then the others.
    assert torch.equal(torch.cat(chosen_blocks), expected[f"dit.mask.{algorithm}"].bool())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_guided_loop_and_its_video(pipe, condition, expected, settings, algorithm):
    wan.apply_attention(pipe.transformer, NablaConfig.parse(algorithm))
    walk = {name: settings[name] for name in ("steps", "shift", "guide_scale", "solver")}
    texts = expected["dit.context"], expected["dit.negative"]
    latents = pipe.sample(*texts, noise=expected["loop.noise"], conditions=condition, **walk)
    assert (latents - expected[f"loop.{algorithm}"]).abs().max() < 1e-4
    video = pipe.decode(latents)[:, ::5, ::16, ::16]
    assert (video - expected[f"loop.{algorithm}.video"]).abs().max() < 1e-4


def test_the_noise_is_the_published_programs(pipe, condition, expected, settings):
    text = torch.zeros(1, 512, 32)
    noise = pipe.draw_noise(pipe.video, settings["seed"], pipe.guide((text, text), condition))
    assert torch.equal(noise[0], expected["loop.noise"])


@pytest.mark.parametrize("cache", ("first_block", "first_block:0.1"))
def test_a_cache_that_adds_hints_twice_is_refused_before_weights_are_read(cache, monkeypatch):
    monkeypatch.setattr(components, "load_transformer", lambda *_: pytest.fail("read"))
    with pytest.raises(InputError, match="cache first_block does not work with WanVACETransformer3DModel"):
        wan.from_pretrained(sets.checkpoint("vace"), cache=cache)
