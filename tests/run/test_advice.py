"""What a run says of settings that its user may not have meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from wan.config.settings import resolve
from wan.models.checkpoint import Checkpoint
from wan.run.advice import unexpected


@pytest.mark.parametrize(
    "algorithm, inputs, frames, hidden",
    (
        ("sta-11-3-3", {"image": "a.png"}, 81, "15 of 21"),
        # Each picture is seen from six frames.
        ("sta-11-3-3", {"image": "a.png", "last_image": "b.png"}, 81, "9 of 21"),
        ("sta-11-3-3", {"src_ref_images": ["a.png"]}, 81, "15 of 21"),
        ("sta-11-3-3", {"image": "a.png"}, 21, None),
        ("sta-11-3-3", {}, 81, None),
        ("nabla-0.7_sta-11-3-3", {"image": "a.png"}, 81, None),
        ("dense", {"image": "a.png"}, 81, None),
    ),
)
def test_a_window_alone_that_hides_a_picture_is_told(nano, algorithm, inputs, frames, hidden):
    layer = {"checkpoint": str(nano), "prompt": "a cat", "attention": {"algorithm": algorithm}, **inputs}
    settings = resolve(layer | {"video": {"size": (832, 480), "frame_num": frames}})
    told = [line for line in unexpected(Checkpoint.open(Path(nano)), settings) if "window alone" in line]
    assert len(told) == (hidden is not None)
    assert hidden is None or f"by which {hidden} latent frames do not see" in told[0]


@pytest.mark.parametrize(
    "attention, told",
    (
        ({"algorithm": "keep-0.1_dropped-mean", "dense_layers": []}, True),
        ({"algorithm": "keep-0.1_dropped-mean", "dense_layers": [1]}, True),
        ({"algorithm": "keep-0.1_dropped-mean", "dense_layers": [0, 1]}, False),
        ({"algorithm": "keep-0.1_dropped-mean", "dense_layers": 0.05}, False),
        ({"dropped": "mean", "profile": {"stretches": [{"until": 1, "keep": [1, 0.1, 0.1]}]}}, False),
        ({"dropped": "mean", "profile": {"stretches": [{"until": 1, "keep": [0.1, 1, 0.1]}]}}, True),
        ({"algorithm": "keep-0.1", "dense_layers": []}, False),
    ),
)
def test_means_of_dropped_blocks_in_the_first_layer_are_told(nano, attention, told):
    settings = resolve({"checkpoint": str(nano), "prompt": "a cat", "attention": attention})
    lines = unexpected(Checkpoint.open(Path(nano)), settings)
    assert any("with layer 0 sparse was measured" in line for line in lines) == told
