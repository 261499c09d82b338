"""Preparing data: what stands in the shards, what is skipped, and that nothing is done twice or lost."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import yaml
from imageio_ffmpeg import get_ffmpeg_exe
from safetensors.torch import load_file
from training_runs import Colours

from nabla import InputError
from scripts import prepare_data
from wan import WanT2V
from wan.files import atomic as files
from wan.models.wan.layout import TEXT_ENCODER_FILE, VAE_FILE
from wan.tools.datasets import open_dataset
from wan.training.clips import Clips
from wan.training.encoder import Encoder
from wan.training.models import open_components
from wan.training.prepare import prepare
from wan.training.prepare_settings import PrepareSettings
from wan.training.video_folder import VideoFolder


@pytest.fixture(scope="module")
def encoder(random_nano) -> Encoder:
    return Encoder(open_components(random_nano), torch.device("cpu"))


def settings_for(out: Path, **changes) -> PrepareSettings:
    return PrepareSettings("nano", str(out), clips_per_shard=3, dtype="float32", **changes)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


def test_shards_hold_what_the_pipeline_would_compute(random_nano, prepared):
    pipe = WanT2V.from_pretrained(random_nano)
    clips = Clips([str(prepared)], pipe.text_length)
    assert len(clips) == 7 and {clip.size for clip in clips.clips} == {(2, 4, 4), (2, 4, 6)}
    video, caption = Colours(8)[5]
    number = next(n for n, clip in enumerate(clips.clips) if clip.index == 5)
    assert clips.clips[number].caption == caption
    latents, text = clips.load(number)
    pixels = torch.from_numpy(video.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert torch.allclose(latents, pipe.encode_video(pixels), atol=1e-5)
    assert torch.allclose(text, pipe.encode_text(*pipe.tokenize(caption))[0], atol=1e-5)
    stored = load_file(clips.clips[number].file)["5.text"]
    assert len(stored) == pipe.tokenize(caption)[1].sum() < 512
    assert torch.allclose(clips.load(0, drops_caption=True)[1], pipe.encode_text(*pipe.tokenize(""))[0], atol=1e-5)


def test_clips_encoded_whole_have_the_same_latents(random_nano, encoder):
    whole = Encoder(open_components(random_nano), torch.device("cpu"), whole_clips=True)
    video = torch.from_numpy(Colours(1)[0][0].copy())[None]
    assert torch.allclose(whole.latents(video), encoder.latents(video), atol=1e-5)


def test_an_encoder_that_overflows_says_so(random_nano):
    half = Encoder(open_components(random_nano), torch.device("cpu"), torch.float16)
    half.vae.encoder.conv_in.weight.data *= 1e6
    with pytest.raises(InputError, match="not finite; prepare with vae_dtype float32"):
        half.latents(torch.from_numpy(Colours(1)[0][0].copy())[None])


def test_a_second_start_makes_only_what_is_missing(encoder, tmp_path, caplog):
    whole = tmp_path / "whole"
    assert prepare(Colours(8, bad=(1, 7)), settings_for(whole), encoder) == (6, 2)
    before = shards(whole)
    (whole / "shard-000001.safetensors").unlink()
    with pytest.MonkeyPatch.context() as patch:
        # A process of a number that none has.
        patch.setattr("os.getpid", lambda: 2**30)
        (whole / files._mark()).write_bytes(b"half")

    class Watched(Colours):
        asked: list[int] = []

        def __getitem__(self, index):
            self.asked.append(index)
            return super().__getitem__(index)

    assert prepare(Watched(8, bad=(1, 7)), settings_for(whole), encoder) == (6, 2)
    assert Watched.asked == [3, 4, 5] and shards(whole) == before
    assert [m for m in caplog.messages if m.startswith("warning")] == [
        "warning: sample 1 is skipped: frame_num 4 is not of the form 4n+1; use 1 or 5",
        "warning: sample 7 is skipped: frame_num 4 is not of the form 4n+1; use 1 or 5",
    ]
    with pytest.raises(InputError, match="made with other settings"):
        prepare(Colours(8), settings_for(whole, dropped_text="nothing"), encoder)


def test_what_a_folder_was_prepared_of_may_not_change_under_it(encoder, random_nano, videos, tmp_path, caplog):
    data, out = shutil.copytree(videos, tmp_path / "data"), settings_for(tmp_path / "out")
    captions, written = data / "captions.jsonl", (data / "captions.jsonl").read_text()
    assert prepare(VideoFolder(str(data)), out, encoder) == (1, 7)
    before = shards(tmp_path / "out")

    def refused(why: str, others: Encoder = encoder) -> None:
        with pytest.raises(InputError, match=why):
            prepare(VideoFolder(str(data)), out, others)

    captions.write_text(written + '{"file": "good.mp4", "caption": "more"}\n')
    refused(
        "was prepared of 8 samples, and there are 9 now; choose another out, or remove it, to make all anew, or prepare"
    )
    captions.write_text(written.replace('"good"', '"fine"'))
    refused("made with other captions; choose another out, or remove it to make all anew")
    captions.write_text(written)
    shutil.copy(data / "good.mp4", data / "cut.mp4")
    refused("made with files of other sizes or times of change; choose another out")
    shutil.copy2(videos / "cut.mp4", data / "cut.mp4")
    for what, file in (("VAE", VAE_FILE), ("text encoder", TEXT_ENCODER_FILE)):
        other = shutil.copytree(random_nano, tmp_path / what)
        weights = torch.load(other / file)
        torch.save({key: weight * 1.01 for key, weight in weights.items()}, other / file)
        refused(f"made with another {what}", Encoder(open_components(other), torch.device("cpu")))
    assert prepare(VideoFolder(str(data)), out, encoder) == (1, 7) and shards(tmp_path / "out") == before
    # A folder that says nothing of what tells these apart goes on, and is told of.
    record = json.loads(before["prepared.json"])
    kept = {key: value for key, value in record.items() if key not in ("vae", "text_encoder", "captions", "files")}
    (tmp_path / "out" / "prepared.json").write_text(json.dumps(kept))
    assert prepare(VideoFolder(str(data)), out, encoder) == (1, 7)
    assert "prepared.json does not tell captions, files, text_encoder, vae; they are taken" in caplog.messages[-1]


@pytest.mark.parametrize("kind", ("processes", "iterable", "workers"))
def test_however_it_is_read_the_shards_are_the_same(kind, encoder, prepared, tmp_path):
    source = Colours(8, bad=(4,))
    if kind == "processes":
        done = [prepare(source, settings_for(tmp_path / "out"), encoder, rank, 2) for rank in (1, 0)]
        assert done == [(2, 1), (5, 0)]
    elif kind == "iterable":
        assert prepare((source[n] for n in range(8)), settings_for(tmp_path / "out"), encoder) == (7, 1)
    else:
        assert prepare(source, settings_for(tmp_path / "out", workers=1), encoder) == (7, 1)
    for path in sorted(prepared.glob("*.safetensors")):
        mine, theirs = load_file(tmp_path / "out" / path.name), load_file(path)
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in mine)


def noise_video(path: Path, size: tuple[int, int], frames: int, fps: int = 16) -> None:
    video = np.random.default_rng(0).integers(0, 256, (frames, size[1], size[0], 3), dtype=np.uint8)
    imageio.mimwrite(path, video, fps=fps, macro_block_size=None)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder of videos, most of them bad in some way."""
    folder = tmp_path_factory.mktemp("videos")
    noise_video(folder / "good.mp4", (48, 32), 5)
    noise_video(folder / "long.mp4", (64, 48), 24, fps=32)
    noise_video(folder / "odd.mp4", (50, 32), 5)
    (folder / "cut.mp4").write_bytes((folder / "good.mp4").read_bytes()[:500])
    lines = [
        {"file": "good.mp4", "caption": "good"},
        {"file": "cut.mp4", "caption": "cut"},
        {"file": "gone.mp4", "caption": "gone"},
        {"file": "good.mp4", "caption": " "},
        {"file": "good.mp4"},
        {"file": "odd.mp4", "caption": "odd"},
        {"file": "long.mp4", "caption": "long"},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"file": \n'
    (folder / "captions.jsonl").write_text(text)
    return folder


def test_bad_videos_and_captions_are_counted_and_never_fatal(random_nano, videos, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    content = {"checkpoint": str(random_nano), "out": "unset", "options": {"folder": str(videos)}}
    config.write_text(yaml.safe_dump(content))
    assert prepare_data.main(["--config", str(config), f"out={tmp_path / 'out'}"]) == 0
    out, said = capsys.readouterr()
    assert out == f"process 0: 1 clips in {tmp_path / 'out'}, 7 samples skipped\n"
    for reason in (
        "sample 1 is skipped: cut.mp4: cannot be read",
        "sample 2 is skipped: gone.mp4: cannot be read",
        "sample 3 is skipped: good.mp4: the caption is empty",
        """sample 4 is skipped: line 5 is not {"file": "...", "caption": "..."} (KeyError('caption'))""",
        "sample 5 is skipped: odd.mp4: size 50*32: both must be positive multiples of 16",
        "sample 6 is skipped: long.mp4: frame_num 24 is not of the form 4n+1; use 21 or 25",
        "sample 7 is skipped: line 8 is not",
    ):
        assert reason in said


def test_captions_of_other_encodings_cost_no_other_line(videos, tmp_path):
    shutil.copy(videos / "good.mp4", tmp_path)
    lines = (
        b'{"file": "good.mp4", "caption": "one"}',
        b"",
        b'{"file": "good.mp4", "caption": "caf\xe9"}',
        b'{"file": 3}',
    )
    (tmp_path / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    source = VideoFolder(str(tmp_path))
    assert len(source) == 3 and source[0][1] == "one"
    with pytest.raises(InputError, match="line 3 is not UTF-8 from byte 37 on; save it as UTF-8"):
        source[1]
    with pytest.raises(InputError, match="line 4 is not {"):
        source[2]


def test_errors_of_a_dataset_cost_only_their_samples(encoder, tmp_path, caplog):
    class Failing(Colours):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("no such\nclip")
            if index == 2:
                return "video", "caption", "more"
            return ([[1], [2, 3]], "ragged") if index == 3 else super().__getitem__(index)

    assert prepare(Failing(5), settings_for(tmp_path / "out"), encoder) == (2, 3)
    assert [message.partition(" is skipped: ")[2][:40] for message in caplog.messages if "skipped:" in message] == [
        "OSError: no such clip",
        "a tuple is not a pair of a video and its",
        "ValueError: setting an array element wit",
    ]
    # What raises within an iterable is its end, and no sample of it to skip.
    with pytest.raises(RuntimeError, match="sample 1: an iterable cannot go on after an error"):
        prepare((Failing(5)[n] for n in range(5)), settings_for(tmp_path / "iterable"), encoder)


def test_an_iterable_that_has_grown_is_prepared_to_its_end(encoder, tmp_path):
    source, settings = Colours(8), settings_for(tmp_path / "out")
    assert prepare((source[n] for n in range(4)), settings, encoder) == (4, 0)
    assert prepare((source[n] for n in range(8)), settings, encoder) == (8, 0)


def test_videos_are_scaled_cropped_and_cut_to_what_is_asked_for(videos, caplog):
    source = VideoFolder(str(videos), sizes=["48*32", "32*32", "64*48"], frame_nums=[9, 5], fps=16)
    assert source[0][0].shape == (5, 32, 48, 3)
    assert source[6][0].shape == (9, 48, 64, 3)
    # The decoder would warn of every video that is scaled.
    assert VideoFolder(str(videos), sizes=["32*32"])[0][0].shape == (5, 32, 32, 3) and not caplog.messages
    with pytest.raises(InputError, match="good.mp4: 48.32 is smaller than any of the sizes"):
        VideoFolder(str(videos), sizes=["64*48"])[0]
    with pytest.raises(InputError, match="good.mp4: its 5 frames are fewer than 9"):
        VideoFolder(str(videos), frame_nums=[9])[0]
    with pytest.raises(InputError, match="good.mp4: its [23] frames at 8 a second are fewer than 5"):
        VideoFolder(str(videos), frame_nums=[5], fps=8)[0]


def test_a_video_that_is_turned_for_showing_is_taken_as_it_is_shown(tmp_path):
    noise_video(tmp_path / "lying.mp4", (64, 32), 5)
    turn = [get_ffmpeg_exe(), "-display_rotation", "90", "-i", tmp_path / "lying.mp4", "-c", "copy"]
    subprocess.run([*turn, tmp_path / "upright.mp4"], check=True, capture_output=True)
    (tmp_path / "captions.jsonl").write_text('{"file": "upright.mp4", "caption": "upright"}')
    assert VideoFolder(str(tmp_path))[0][0].shape == (5, 64, 32, 3)
    assert VideoFolder(str(tmp_path), sizes=["64*32", "32*64"])[0][0].shape == (5, 64, 32, 3)


@pytest.mark.parametrize(
    "name, options, message",
    (
        ("shape", {}, "dataset 'shape' is not known; use one of videos"),
        ("videos", {"path": "x"}, "its options are folder, sizes, frame_nums, fps"),
        ("videos", {"folder": 5}, "folder 5 is not a path; put it in quotes"),
        ("shapes", {"count": 2.5}, "count 2.5 is not a whole number from 0"),
        ("shapes", {"count": 2, "seed": "x"}, "seed 'x' is not a whole number from 0"),
        ("shapes", {"count": 2, "offset": "x"}, "offset 'x' is not a whole number from 0"),
        ("shapes", {"count": 2, "rough": "x"}, "rough 'x' is not a number from 0 to 1"),
        ("videos", {"folder": "/nowhere"}, "captions.jsonl cannot be read"),
        ("videos", {"folder": "x", "sizes": ["33*32"]}, "size 33.32: both must be positive multiples of 16"),
        ("videos", {"folder": "x", "frame_nums": 81}, "frame_nums 81 is not a list"),
        ("videos", {"folder": "x", "fps": "fast"}, "fps 'fast' is not a positive number"),
        ("videos", {"folder": "x", "frame_nums": [8]}, "frame_num 8 is not of the form"),
    ),
)
def test_wrong_datasets_are_one_clear_line(name, options, message):
    with pytest.raises(InputError, match=message):
        open_dataset(name, options)


def test_several_folders_are_taken_together(prepared, encoder, tmp_path):
    prepare(Colours(3), settings_for(tmp_path / "more"), encoder)
    folders = [str(prepared), str(tmp_path / "more")]
    one, more, both = Clips(folders[:1], 512), Clips(folders[1:], 512), Clips(folders, 512)
    assert len(both) == len(one) + len(more) and both.buckets.keys() == one.buckets.keys()
    assert torch.equal(both.load(len(one) + 2)[0], more.load(2)[0])
    record = tmp_path / "more" / "prepared.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"vae": "another"}))
    with pytest.raises(InputError, match="more and .* differ in vae; prepare one anew"):
        Clips(folders, 512)
    with pytest.raises(InputError, match="more and .* differ in vae; prepare one anew"):
        Clips(folders[1:], 512, beside=one)
    prepare(Colours(3), settings_for(tmp_path / "other", dropped_text="nothing"), encoder)
    with pytest.raises(InputError, match="differ in text encoder or dropped_text"):
        Clips([folders[0], str(tmp_path / "other")], 512)
