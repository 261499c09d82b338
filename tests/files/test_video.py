"""Writing of videos: what is said where it fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nabla import InputError
from wan.files import video


def test_a_disk_that_the_video_fills_is_not_blamed_on_the_encoder(tmp_path, monkeypatch):
    def encode(ffmpeg: str, path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise video.EncoderError("encoder ended with code 1")

    # As of a disk that has no room for as long as the half-written video is there.
    monkeypatch.setattr(video, "_encode", encode)
    monkeypatch.setattr(video, "_is_full", lambda folder: any(folder.rglob("*.mp4")))
    with pytest.raises(InputError, match="free some space") as caught:
        video.write_with_sidecar(tmp_path / "x.mp4", np.zeros((5, 16, 16, 3), np.uint8), 16, {})
    assert video.OTHER_ENCODER not in str(caught.value) and list(tmp_path.iterdir()) == []
