"""Videos that others are made of: read whole, frame by frame, or refused in one line."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from nabla import InputError
from wan.files import source_video
from wan.files.source_video import SourceVideo, check_pair, mask_of, size_of_video, video_of
from wan.files.video import write_video

FRAMES = 15


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file whose frames are grey, each lighter than the one before, and others that are damaged or none."""
    folder = tmp_path_factory.mktemp("videos")
    frames = np.broadcast_to(np.arange(FRAMES, dtype=np.uint8)[:, None, None, None] * 16, (FRAMES, 48, 64, 3))
    write_video(folder / "grey.mp4", frames, 10)
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 96, 128, 3), dtype=np.uint8)
    write_video(folder / "noise.mp4", noise, 10)
    ffmpeg = [get_ffmpeg_exe(), "-v", "error"]
    rewrite = [*ffmpeg, "-i", folder / "noise.mp4", "-c", "copy", "-movflags", "faststart", folder / "fast.mp4"]
    subprocess.run(rewrite, check=True)
    whole = (folder / "fast.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "headless.mp4").write_bytes((folder / "noise.mp4").read_bytes()[:5000])
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").touch()
    subprocess.run([*ffmpeg, "-f", "lavfi", "-i", "sine=d=1", folder / "sound.mp4"], check=True)
    os.mkfifo(folder / "pipe.mp4")
    return folder


def test_a_file_is_read_frame_by_frame(folder):
    video = SourceVideo.open(folder / "grey.mp4")
    assert (video.size, video.count, video.fps) == ((64, 48), FRAMES, 10)
    taken = list(video.take([0, 3, 4, 14]))
    assert all(frame.shape == (48, 64, 3) and frame.dtype == np.uint8 for frame in taken)
    assert np.abs(np.array([frame.mean() for frame in taken]) - np.array([0, 3, 4, 14]) * 16).max() < 3
    assert size_of_video(str(folder / "grey.mp4"), "src_video") == (64, 48)


def test_whoever_has_enough_stops_the_decoder(folder, monkeypatch):
    started = []
    begin = subprocess.Popen
    monkeypatch.setattr(
        source_video.subprocess, "Popen", lambda *args, **kwargs: started.append(begin(*args, **kwargs)) or started[-1]
    )
    frames = SourceVideo.open(folder / "noise.mp4").take(range(FRAMES))
    next(frames)
    frames.close()
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize(
    "name, said",
    (
        ("none.mp4", "cannot be read .No such file or directory.; give an .mp4"),
        (".", "is a folder"),
        ("pipe.mp4", "is no ordinary file"),
        ("text.mp4", "is no video that can be read"),
        ("empty.mp4", "is no video that can be read"),
        ("headless.mp4", "is no video that can be read"),
        ("sound.mp4", "is no video that can be read"),
        ("cut.mp4", "is damaged"),
        ("a\0b.mp4", "cannot be read"),
    ),
)
def test_what_is_no_whole_video_is_one_line(folder, name, said):
    with pytest.raises(InputError, match=rf"src_video .*{said}") as caught:
        SourceVideo.open(folder / name)
    assert "\n" not in str(caught.value)


def test_too_many_frames_and_pixels_are_refused_early(folder, monkeypatch):
    monkeypatch.setattr(source_video, "MAX_FRAMES", 9)
    with pytest.raises(InputError, match="noise.mp4 has more than 9 frames; cut out the part"):
        SourceVideo.open(folder / "noise.mp4")
    monkeypatch.setattr(source_video, "MAX_PIXELS", 128)
    monkeypatch.setattr(source_video, "_decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(InputError, match="128x96, of more than 128 pixels; make it smaller"):
        SourceVideo.open(folder / "noise.mp4")


def test_arrays_and_videos_are_taken_as_they_are(folder):
    frames = np.zeros((5, 6, 4, 3), np.uint8)
    video = video_of(frames)
    assert (video.size, video.count) == ((4, 6), 5) and video_of(video) is video
    assert SourceVideo(frames, fps=25).fps == 25
    for wrong in (frames[0], frames.astype(float), [1, 2], frames[..., :1], frames[:0], frames[:, :0]):
        with pytest.raises(InputError, match="src_video "):
            video_of(wrong)
    for fps in (0, -1, float("nan"), "16"):
        with pytest.raises(InputError, match="fps .*must be a positive number"):
            SourceVideo(frames, fps)


def test_a_picture_is_a_mask_of_any_number_of_frames(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    for given in (tmp_path / "mask.png", str(tmp_path / "mask.png"), pixels):
        mask = mask_of(given)
        assert mask.is_still and mask.size == (4, 6)
        assert all(np.array_equal(frame, pixels) for frame in mask.take([0, 2, 9]))
    assert size_of_video(str(tmp_path / "mask.png"), "src_mask") == (4, 6)


def test_a_mask_has_a_video_of_its_size_and_length():
    video = SourceVideo(np.zeros((5, 6, 4, 3), np.uint8))
    check_pair(None, None)
    check_pair(video, None)
    check_pair(video, mask_of(np.zeros((5, 6, 4, 3), np.uint8)))
    check_pair(video, mask_of(np.zeros((6, 4, 3), np.uint8)))
    for mask, said in (
        (np.zeros((4, 6, 4, 3), np.uint8), "src_mask has 4 frames, and src_video 5"),
        (np.zeros((5, 4, 6, 3), np.uint8), "src_mask is 6x4, and src_video 4x6"),
        (np.zeros((4, 6, 3), np.uint8), "src_mask is 6x4, and src_video 4x6"),
    ):
        with pytest.raises(InputError, match=said):
            check_pair(video, mask_of(mask))
    with pytest.raises(InputError, match="give that as src_video"):
        check_pair(None, mask_of(np.zeros((6, 4, 3), np.uint8)))
