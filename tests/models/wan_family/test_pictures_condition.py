"""What stands beside the noise of Wan's videos from pictures: plain to use, and refused where it is wrong."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from picture_pipelines import FRAMES, LATENTS, SIZE, picture, pipeline

from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError
from wan.config.settings import VideoSettings
from wan.models.wan.condition import Condition
from wan.models.wan.inputs import fitted
from wan.models.wan.text_image_to_video import token_timesteps
from wan.sampling.request import VideoRequest


def test_a_condition_is_a_tensor_whose_results_are_plain():
    y, clip = torch.randn(20, *LATENTS), torch.randn(1, 5, 8)
    condition = Condition.of(y, clip, references=2, context_scale=0.5)
    assert isinstance(condition, torch.Tensor) and condition.shape == y.shape
    for plain in (condition.y, condition + 1, condition[None], torch.cat((condition, y)), condition * 1.0):
        assert type(plain) is torch.Tensor
    assert torch.equal(condition.y, y) and condition.clip is clip
    assert (condition.references, condition.context_scale) == (2, 0.5)
    for copied in (copy.deepcopy(condition), condition.to(torch.float64), pickle.loads(pickle.dumps(condition))):
        assert type(copied) is Condition and torch.equal(copied.float(), y) and torch.equal(copied.clip.float(), clip)
        assert (copied.references, copied.context_scale) == (2, 0.5)
    assert repr(condition).startswith("Condition(")


def test_a_video_with_a_condition_has_the_noises_shape_and_a_tensor_stands_for_one():
    pipe = pipeline("i2v-A14B")
    condition = pipe.condition(picture(), size=SIZE, frame_num=FRAMES)
    assert condition.shape == (20, *LATENTS) and condition.clip is None
    context, noise = torch.randn(1, 7, 32), torch.randn(2, 16, *LATENTS)
    latents = pipe.sample(context, context, noise=noise, conditions=condition)
    assert type(latents) is torch.Tensor and latents.shape == noise.shape
    assert torch.equal(pipe.sample(context, context, noise=noise, conditions=condition.y), latents)
    with torch.no_grad():
        assert not torch.equal(
            pipe.sample(context, context, noise=noise, conditions=torch.zeros(20, *LATENTS)), latents
        )


def test_without_a_size_a_video_has_the_pictures_form():
    pipe = pipeline("i2v-A14B")
    assert pipe.condition(image=picture(96, 48)).shape == (20, 2, 2, 6)
    request = VideoRequest("", VideoSettings((832, 480), 81), pipe.sampling, picture(832, 480))
    assert fitted(pipe.kind, request).size == (832, 464)


@pytest.mark.parametrize(
    "conditions, said",
    (
        (None, "conditions are missing.*pipe.condition"),
        (np.zeros((20, *LATENTS)), "are a ndarray, but must be what pipe.condition gave"),
        (torch.zeros(20, 2, 6, 5), r"\(20, 2, 6, 5\) do not fit: they must be \(20, 2, 6, 4\)"),
        (torch.zeros(16, *LATENTS), r"must be \(20, 2, 6, 4\)"),
        (torch.zeros(1, 20, *LATENTS), r"must be \(20, 2, 6, 4\)"),
        (Condition.of(torch.zeros(20, *LATENTS), torch.zeros(1, 5, 24)), "does not see; give them as .y"),
    ),
)
def test_conditions_that_do_not_fit_are_refused(conditions, said):
    context = torch.randn(1, 7, 32)
    with pytest.raises(InputError, match=said):
        pipeline("i2v-A14B").sample(context, context, noise=torch.randn(1, 16, *LATENTS), conditions=conditions)


@pytest.mark.parametrize(
    "kind, states, said",
    (
        ("i2v", None, "lack states of pictures.*pipe.condition"),
        ("i2v", (2, 5, 24), r"\(2, 5, 24\), but must be of \(1, 5, 24\)"),
        ("i2v", (1, 5, 23), r"must be of \(1, 5, 24\)"),
        ("flf2v", (1, 5, 24), r"must be of \(2, 5, 24\)"),
    ),
)
def test_states_of_pictures_that_a_transformer_does_not_see_are_refused(kind, states, said):
    pipe = pipeline(kind)
    y, context = torch.zeros(20, *LATENTS), torch.randn(1, 7, 32)
    given = y if states is None else Condition.of(y, torch.zeros(states))
    with pytest.raises(InputError, match=said):
        pipe.sample(context, context, noise=torch.randn(1, 16, *LATENTS), conditions=given)


def test_inputs_that_are_missing_or_not_taken_are_refused():
    two = pipeline("flf2v")
    for pipe, given, said in (
        (pipeline("i2v-A14B"), {}, "image is missing"),
        (pipeline("i2v-A14B"), {"image": picture(), "last_image": picture()}, "last_image is not taken.*leave it out"),
        (two, {"image": picture()}, "last_image is missing"),
        (pipeline("ti2v-5B"), {"last_image": picture()}, "last_image is not taken"),
        (pipeline("ti2v-5B"), {}, "nothing stands beside the noise"),
    ):
        with pytest.raises(InputError, match=said):
            pipe.condition(**given)
    with pytest.raises(InputError, match="image is missing"):
        pipeline("i2v-A14B").generate("a cat")


def test_pictures_before_text_of_other_than_512_rows_are_refused():
    pipeline("i2v-A14B", text_length=256)
    with pytest.raises(CheckpointError, match="text_len is 256, but must be 512"):
        pipeline("i2v", text_length=256)


def test_only_the_first_frames_tokens_are_clean():
    timesteps = token_timesteps(torch.tensor([999, 500]), (3, 2, 2))
    assert timesteps.dtype == torch.float32
    assert torch.equal(timesteps, torch.tensor([[0] * 4 + [999] * 8, [0] * 4 + [500] * 8], dtype=torch.float32))


def test_what_is_held_stands_in_the_first_frame_and_the_rest_is_untouched():
    pipe = pipeline("ti2v-5B")
    condition = pipe.condition(picture(), size=SIZE)
    assert condition.shape == (16, 1, 6, 4)
    latents = torch.randn(2, 16, *LATENTS)
    texts = torch.zeros(2, 512, 32), None
    held = pipe.hold(latents, pipe.guide(texts, condition))
    assert torch.equal(held[:, :, 0], condition.y[None, :, 0].expand(2, -1, -1, -1))
    assert torch.equal(held[:, :, 1:], latents[:, :, 1:])
    assert pipe.hold(latents, pipe.guide(texts, None)) is latents


def test_one_timestep_for_all_is_that_of_every_token():
    pipe = pipeline("ti2v-5B")
    latents, context = torch.randn(1, 16, *LATENTS), torch.randn(1, 512, 32)
    timestep = torch.tensor([700.0])
    with torch.no_grad():
        plain = pipe.transformer(latents, timestep, context, return_dict=False)[0]
        tokens = pipe.transformer(latents, timestep[:, None].expand(1, 12), context, return_dict=False)[0]
    torch.testing.assert_close(plain, tokens, atol=1e-6, rtol=0)
