"""Videos from pictures, from the prompt to frames, of random checkpoints of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from picture_pipelines import given_to, picture

import wan
from nabla import InputError
from wan.models.wan import random_checkpoint

SIZES = {"i2v": (96, 64), "flf2v": (96, 64), "i2v-A14B": (96, 64), "ti2v-5B": (96, 64)}


@pytest.fixture(scope="module")
def pipe_of(tmp_path_factory):
    pipes = {}

    def load(kind: str) -> wan.WanT2V:
        if kind not in pipes:
            folder = tmp_path_factory.mktemp(kind) / "checkpoint"
            random_checkpoint.write(f"{kind}-nano", folder, torch.float32)
            pipes[kind] = wan.from_pretrained(folder)
        return pipes[kind]

    return load


@pytest.mark.parametrize("kind", ("i2v", "flf2v", "i2v-A14B", "ti2v-5B"))
def test_a_video_has_the_pictures_form_unless_its_size_is_exact(kind, pipe_of):
    pipe, given = pipe_of(kind), given_to(kind) | {"image": picture(150, 100)}
    settings = dict(frame_num=5, seed=0, steps=2)
    fitted = pipe.generate("a cat", size=(64, 96), **settings, **given)
    assert fitted.shape == (5, *SIZES[kind][::-1], 3)
    exact = pipe.generate("a cat", size=(64, 96), exact_size=True, **settings, **given)
    assert exact.shape == (5, 96, 64, 3)
    assert np.array_equal(pipe.generate("a cat", size=SIZES[kind], exact_size=True, **settings, **given), fitted)
    other = given | {"image": 255 - given["image"]}
    assert (pipe.generate("a cat", size=SIZES[kind], exact_size=True, **settings, **other) != fitted).any()


def test_text_alone_is_enough_for_some(pipe_of):
    assert pipe_of("ti2v-5B").generate("a cat", size=(64, 64), frame_num=5, steps=1).shape == (5, 64, 64, 3)
    with pytest.raises(InputError, match="^image is missing"):
        pipe_of("i2v").generate("a cat", size=(64, 64), frame_num=5, steps=1)
