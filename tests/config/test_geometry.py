"""Sizes that follow from how a family cuts pixels into latents and tokens."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from nabla import InputError
from wan.config.geometry import DEFAULT_GEOMETRY, Geometry
from wan.config.settings import VideoSettings, resolve, resolve_sampling, resolve_video

COARSE = Geometry(vae_stride=(8, 16, 32), patch=(1, 2, 2))
ROOM = {"checkpoint": "x", "prompt": "a cat"}


def test_a_video_has_latents_and_tokens_as_its_family_cuts_them():
    video = VideoSettings((128, 96), 17)
    assert (video.latents_size, video.token_grid) == ((5, 12, 16), (5, 6, 8))
    coarse = VideoSettings((128, 96), 17, geometry=COARSE)
    assert (coarse.latents_size, coarse.token_grid) == ((3, 6, 4), (3, 3, 2))
    assert replace(coarse, frame_num=9).token_grid == (2, 3, 2)


def test_messages_name_the_sizes_of_the_family():
    with pytest.raises(InputError, match=r"both must be positive multiples of 32; the nearest below is 64\*32"):
        VideoSettings((96, 48), 17, geometry=COARSE)
    with pytest.raises(InputError, match=r"frame_num 13 is not of the form 8n\+1; use 9 or 17"):
        VideoSettings((128, 96), 13, geometry=COARSE)
    with pytest.raises(InputError, match=r"17 frames of 128\*96 are too many; at most 9 of 128\*64"):
        VideoSettings((128, 96), 17, geometry=COARSE).check_positions(2)


def test_a_geometry_is_no_setting():
    coarse = resolve(ROOM | {"video": {"size": "128*96", "frame_num": 17}}, geometry=COARSE)
    assert coarse.video.geometry == COARSE and resolve(ROOM).video.geometry == DEFAULT_GEOMETRY
    assert "geometry" not in asdict(coarse.video) and "vae_stride" not in json.dumps(coarse.to_dict())
    assert resolve(coarse.to_dict()) == coarse
    with pytest.raises(InputError, match="'geometry'; allowed are exact_size, fps, frame_num, size"):
        resolve(ROOM | {"video": {"geometry": 1}})


@pytest.mark.parametrize("limit, most", [(1, 1), (8, 1), (9, 9), (20, 17)])
def test_the_longest_video_within_a_limit(limit, most):
    assert COARSE.most_frames(limit) == most
    VideoSettings((128, 96), most, geometry=COARSE)


def test_layers_of_a_preset_need_no_prompt_and_its_parts_no_checkpoint():
    preset = resolve({"prompt": " ", "sampling": {"steps": 3}}, {"checkpoint": "x"}, needs_prompt=False)
    assert preset.prompt is None and resolve(preset.to_dict(), {"prompt": "a cat"}) == replace(preset, prompt="a cat")
    with pytest.raises(InputError, match="the prompt is empty"):
        resolve(preset.to_dict())
    layer = {"sampling": {"steps": 3}, "video": {"frame_num": 5}}
    assert (resolve_sampling(layer).steps, resolve_video(layer).frame_num) == (3, 5)
    with pytest.raises(InputError, match="sampling has an unknown key 'step'"):
        resolve_sampling({"sampling": {"step": 3}})
