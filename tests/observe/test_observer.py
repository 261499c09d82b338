"""Looking on between steps: what an observer is told, and that ending a video there leaves the pipeline as new."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import relative_error

from nabla import NablaConfig
from wan import WanT2V
from wan.config.settings import VideoSettings
from wan.observe.observer import Observer
from wan.sampling.loop import Cancelled

ATTENTION = NablaConfig(threshold=0.5, dense_steps=1, mask_refresh=2)


class Each(Observer):
    """Calls a function with what it is told of each step."""

    def __init__(self, function):
        self.step_ends = function


@pytest.fixture(scope="module")
def pipe(random_nano) -> WanT2V:
    return WanT2V.from_pretrained(random_nano, ATTENTION)


def make(pipe: WanT2V, **more) -> np.ndarray:
    return pipe.generate("A red circle", size=(64, 64), frame_num=5, seed=1, steps=4, **more)


@pytest.mark.parametrize("solver", ("unipc", "dpm++"))
def test_each_step_is_told_with_the_clean_latents_that_it_predicts(pipe, solver):
    told = []
    context = torch.zeros(1, 1, pipe.transformer.config.text_dim)
    noise = pipe.draw_noise(VideoSettings((64, 64), 5), seed=1)

    look = Each(lambda step, clean: told.append((step, clean)))
    latents = pipe.sample(context, context, noise=noise, steps=4, solver=solver, observer=look)
    assert [step for step, _ in told] == [0, 1, 2, 3]
    assert all(clean.shape == noise.shape for _, clean in told)
    # A walk ends at what its last step predicts.
    assert relative_error(told[-1][1], latents) < 1e-5 < 0.01 < relative_error(told[0][1], latents)


def test_looking_on_changes_nothing(pipe):
    look = Each(lambda step, clean: pipe.glimpse(clean))
    assert (make(pipe, observer=look) == make(pipe)).all()


@pytest.mark.parametrize("last", (0, 1, 2))
def test_a_cancelled_video_leaves_nothing_to_the_next(pipe, last):
    def stop(step, clean):
        if step == last:
            raise Cancelled

    expected = make(pipe)
    with pytest.raises(Cancelled):
        make(pipe, observer=Each(stop))
    assert all(layer.block_mask is None for layer in pipe.transformer.nabla.layers)
    assert (make(pipe) == expected).all()


def test_a_glimpse_is_the_first_frame(pipe):
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    picture = pipe.glimpse(latents)
    assert picture.shape == (1, 3, 32, 48)
    assert torch.equal(picture, pipe.decode(latents)[:, :, 0])
