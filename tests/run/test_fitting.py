"""What each kind of Wan takes beside prompts, and what size of video fits it, before anything is loaded."""

from __future__ import annotations

import logging

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from nabla import InputError
from wan import Checkpoint
from wan.config.settings import resolve
from wan.models.wan.family import WAN
from wan.run.inputs import check_inputs, fit_to_inputs

IMAGE, LAST, REFERENCES = {"image": "a.png"}, {"last_image": "b.png"}, {"src_ref_images": ["a.png", "b.png"]}


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """`fit(kind, layer)`: settings of a layer as a checkpoint of a kind of Wan makes them; a.png is 640x360."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (640, 360)).save("a.png")
    Image.new("RGB", (64, 64)).save("b.png")

    def fit(kind: str, layer: dict):
        checkpoint = Checkpoint("here", tmp_path, True, {}, WAN, kind=kind)
        return fit_to_inputs(checkpoint, resolve({"checkpoint": "here", "prompt": "A cat"}, layer))

    return fit


@pytest.mark.parametrize(
    "kind, layer, said",
    (
        ("t2v", IMAGE, "image .*a.png is not taken by t2v, which starts from text alone; leave it out"),
        ("t2v-A14B", IMAGE, "image .*a.png is not taken by t2v-A14B, which starts from text alone; leave it out"),
        ("i2v", {}, "videos of i2v begin with a picture; give one with --image FILE"),
        ("i2v-A14B", {}, "videos of i2v-A14B begin with a picture; give one with --image FILE"),
        ("i2v", IMAGE | LAST, "last_image .*b.png is not taken by i2v, which takes image; leave it out"),
        ("flf2v", IMAGE, "videos of flf2v end with a picture; give one with --last_image FILE"),
        ("flf2v", LAST, "videos of flf2v begin with a picture; give one with --image FILE"),
        ("ti2v-5B", IMAGE | LAST, "last_image .*b.png is not taken by ti2v-5B, which takes image; leave it out"),
        ("i2v", IMAGE | REFERENCES, "src_ref_images .*a.png is not taken by i2v, which takes image; leave it out"),
        (
            "ti2v-5B",
            {"src_video": "a.mp4"},
            "src_video .*a.mp4 is not taken by ti2v-5B, which takes image; leave it out",
        ),
        (
            "vace",
            IMAGE,
            "image .*a.png is not taken by vace, which takes src_mask, src_ref_images, src_video; leave it out",
        ),
        (
            "vace",
            {"src_mask": "a.mp4"},
            "src_mask .*a.mp4 says which parts of a source video are made anew; give that as --src_video",
        ),
        (
            "flf2v",
            IMAGE | LAST | {"video": {"frame_num": 1}},
            "frame_num 1 is too short for a first and a last picture; use 5 or more",
        ),
        (
            "i2v",
            IMAGE | {"sampling": {"context_scale": 0.5}},
            "context_scale 0.5 is of a source video, which i2v does not take; leave it out",
        ),
    ),
)
def test_what_is_not_taken_and_what_is_missing_is_a_line(fit, kind, layer, said):
    with pytest.raises(InputError, match=f"^{said}$"):
        fit(kind, layer)


@pytest.mark.parametrize("kind, layer", (("t2v", {}), ("ti2v-5B", {}), ("vace", {}), ("vace", REFERENCES)))
def test_without_a_picture_the_size_is_the_one_that_is_asked_for(fit, kind, layer):
    asked = {"size": "832*480", "exact_size": True}
    assert fit(kind, layer | {"video": asked}) == fit(kind, layer | {"video": {"size": "832*480"}})
    assert fit(kind, layer | {"video": asked}).video.size == (832, 480)


@pytest.mark.parametrize(
    "kind, layer, size",
    (
        # As the published programs have it.
        ("i2v", IMAGE, (832, 464)),
        ("i2v-A14B", IMAGE, (832, 464)),
        ("flf2v", IMAGE | LAST, (832, 464)),
        ("ti2v-5B", IMAGE, (832, 480)),
    ),
)
def test_a_picture_gives_a_video_its_form_once_and_for_all(fit, kind, layer, size, caplog):
    caplog.set_level(logging.INFO, "wan")
    made = fit(kind, layer | {"video": {"size": "832*480"}})
    assert made.video.size == size and made.video.exact_size
    assert (f"size: {size[0]}x{size[1]} fits the picture, which is 640x360; 832x480 was asked for" in caplog.text) == (
        size != (832, 480)
    )
    assert fit(kind, made.to_dict()) == made
    exact = fit(kind, layer | {"video": {"size": "480*832", "exact_size": True}})
    assert exact.video.size == (480, 832)


@pytest.fixture
def sources(tmp_path):
    """c.mp4, eleven frames of 96x64, and masks: m.png, m.mp4, and long.mp4, of one frame more."""
    Image.new("RGB", (96, 64), "white").save(tmp_path / "m.png")
    for name, frames in (("c.mp4", 11), ("m.mp4", 11), ("long.mp4", 12)):
        iio.imwrite(tmp_path / name, np.zeros((frames, 64, 96, 3), np.uint8), fps=16)


@pytest.mark.parametrize("mask", ({}, {"src_mask": "m.png"}, {"src_mask": "m.mp4"}))
def test_a_source_video_gives_one_its_form_and_its_length(fit, sources, mask, caplog):
    caplog.set_level(logging.INFO, "wan")
    given = {"src_video": "c.mp4"} | mask
    made = fit("vace", given | {"video": {"size": "832*480"}, "sampling": {"context_scale": 0.5}})
    assert made.video.size == (96, 64) and made.video.exact_size and made.video.frame_num == 9
    assert "size: 96x64 fits the source video, which is 96x64; 832x480 was asked for" in caplog.text
    assert "frames: 9 fit the source video, which has 11; 81 were asked for" in caplog.text
    # What a picture is, is told once a video, when it is read for that.
    assert "src_mask" not in caplog.text
    assert fit("vace", made.to_dict()) == made
    asked = {"size": "64*64", "frame_num": 5}
    exact = fit("vace", given | {"video": asked | {"exact_size": True}}).video
    assert exact.size == (64, 64) and exact.frame_num == 5
    assert fit("vace", given | {"video": asked}).video.size == (80, 48)


def test_a_mask_that_does_not_fit_and_a_source_that_is_no_video_are_lines(fit, sources, tmp_path):
    with pytest.raises(InputError, match="long.mp4 has 12 frames, and src_video .*c.mp4 11; a mask must have as many"):
        fit("vace", {"src_video": "c.mp4", "src_mask": "long.mp4"})
    (tmp_path / "text.mp4").write_text("no video")
    given = resolve({"checkpoint": "here", "prompt": "A cat", "src_video": "text.mp4"})
    with pytest.raises(InputError, match="^src_video .*text.mp4 is no video that can be read"):
        check_inputs(given, [])
    with pytest.raises(InputError, match="^src_mask .*none.mp4 cannot be read"):
        check_inputs(resolve({"checkpoint": "here", "prompt": "A cat"}), [{"src_mask": "none.mp4"}])
