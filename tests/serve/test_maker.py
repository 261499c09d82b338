"""Videos made in order by one pipeline: what comes of each, and what is loaded for it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from PIL import Image

from nabla import InputError, NablaConfig
from wan.run.generation import load_pipeline
from wan.run.request import Options
from wan.sampling import guided
from wan.serve.workers import maker as maker_module
from wan.serve.workers.maker import Maker
from wan.serve.workers.messages import (
    DECODING,
    LOADING,
    READING,
    SAMPLING,
    WRITING,
    Aborted,
    Failed,
    InputFile,
    Made,
    Order,
    Progress,
)
from wan.serve.workers.pictures import sprite_sheet, thumbnail

SMALL = {"sampling": {"steps": 2, "seed": 1}, "video": {"size": "64*48", "frame_num": 5}, "prompt": "A red circle"}


@pytest.fixture(scope="module")
def maker(random_nano) -> Maker:
    return Maker(Options(device="cpu"), str(random_nano))


def make(maker: Maker, **layer) -> Made | Failed | Aborted | None:
    return maker.make(Order("video_1", SMALL | layer), lambda progress: None, lambda: False)


def test_a_video_comes_with_its_record_and_pictures_and_tells_how_far_it_is(maker):
    told: list[Progress] = []
    order = Order("video_1", SMALL | {"attention": {"algorithm": "nabla-0.5"}})
    made = maker.make(order, told.append, lambda: False)
    assert isinstance(made, Made) and set(made.files) == {
        "video.mp4",
        "video.json",
        "thumbnail.webp",
        "spritesheet.webp",
    }
    assert iio.imread(made.files["video.mp4"], extension=".mp4").shape == (5, 48, 64, 3)
    record = json.loads(made.files["video.json"])
    assert record["settings"] == json.loads(json.dumps(made.settings)) and made.settings["sampling"]["seed"] == 1
    sizes = [Image.open(io.BytesIO(made.files[name])).size for name in ("thumbnail.webp", "spritesheet.webp")]
    assert sizes == [(64, 48), (4 * 64, 2 * 48)]
    assert set(made.seconds) == {"loading", "text", "sampling", "decode", WRITING}
    assert 0 < made.kept < 1 and made.peak_bytes is None
    stages = [one.stage for one in told]
    assert list(dict.fromkeys(stages)) == [LOADING, READING, SAMPLING, DECODING, WRITING]
    assert [one.step for one in told if one.stage == SAMPLING] == [0, 1, 2] and {one.steps for one in told} == {0, 2}
    previews = [one.preview for one in told if one.preview is not None]
    assert previews and Image.open(io.BytesIO(previews[0])).size == (64, 48)


def test_one_frame_is_a_picture(maker):
    made = make(maker, video={"size": "32*32", "frame_num": 1})
    assert Image.open(io.BytesIO(made.files["video.png"])).size == (32, 32) and made.kept is None


def test_what_is_loaded_stays_until_other_weights_are_wanted(maker):
    make(maker, attention={"algorithm": "nabla-0.5"})
    pipe = maker.loaded.pipe
    assert isinstance(make(maker, attention={"algorithm": "keep-0.5"}), Made) and maker.loaded.pipe is pipe
    # What a share that no weights were tuned for gets where nothing else is said.
    untuned = NablaConfig(keep=0.5, pool=(1, 4, 4), dense_steps=0.25, dense_layers=(0,))
    assert pipe.transformer.nabla.config == untuned
    make(maker, vae_dtype="bfloat16")
    assert maker.loaded.pipe is not pipe


def test_models_of_several_families_are_swapped(maker, random_nano, kandinsky_nano):
    makers = [make(maker, checkpoint=str(folder)) for folder in (kandinsky_nano, random_nano, kandinsky_nano)]
    names = [Path(made.settings["checkpoint"]).name for made in makers]
    assert names == [kandinsky_nano.name, random_nano.name, kandinsky_nano.name]
    assert all(made.seconds["loading"] > 0 for made in makers)
    assert type(maker.loaded.pipe).__name__ == "Kandinsky5"


def test_a_video_that_outgrows_its_plan_of_memory_is_planned_anew(random_nano):
    loaded = []

    def load(checkpoint, every, device, options, processes):
        loaded.append(every[0].video.size)
        return load_pipeline(checkpoint, every, device, replace(options, memory=None))

    maker = Maker(Options(device="cpu", memory="auto"), str(random_nano), load)
    for size in ("32*32", "64*48", "32*48"):
        assert isinstance(make(maker, video={"size": size, "frame_num": 1}), Made)
    assert loaded == [(32, 32), (64, 48)]


@pytest.mark.parametrize("asked", (1, 2, 3, 5))
def test_a_video_that_nobody_wants_any_more_ends_at_a_step(maker, asked):
    """asked: how often it is asked whether anybody does, until nobody does."""
    asking = iter([False] * (asked - 1) + [True])
    steps = []
    order = Order("video_1", SMALL | {"sampling": {"steps": 100}})
    assert maker.make(order, lambda progress: steps.append(progress.step), lambda: next(asking)) == Aborted()
    # Asked before and after loading, after the text, and after each step.
    assert max(steps) == max(0, asked - 4)
    assert isinstance(make(maker), Made)


@pytest.mark.parametrize(
    "layer, code, message",
    (
        ({"prompt": " "}, "invalid_request", "the prompt is empty"),
        ({"video": {"size": "64*48", "frame_num": 6}}, "invalid_request", "frame_num 6 is not of the form 4n+1"),
        ({"checkpoint": "/secret/place/model"}, "internal_error", "checkpoint 'model' is neither"),
    ),
)
def test_what_is_wrong_with_an_order_is_a_line_that_names_no_folder(maker, layer, code, message):
    failed = make(maker, **layer)
    assert failed.code == code and message in failed.message and "/secret" not in failed.message


def test_a_lora_that_does_not_fit_is_an_error_that_keeps_the_model(maker, tmp_path):
    make(maker)
    pipe = maker.loaded.pipe
    from safetensors.torch import save_file

    save_file({"diffusion_model.other.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    failed = make(maker, lora=[str(tmp_path / "other.safetensors")])
    assert failed.code == "invalid_request" and "0 of 1 weights match" in failed.message
    assert maker.loaded.pipe is pipe and str(tmp_path) not in failed.message


@pytest.mark.parametrize(
    "error, code, message",
    (
        (torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory", "the GPU ran out of memory; try a smaller"),
        (MemoryError(), "out_of_memory", "there is too little memory"),
        (KeyError("/secret/place/x"), "internal_error", "KeyError: 'x'"),
    ),
)
def test_an_error_in_sampling_fails_one_video(maker, monkeypatch, error, code, message, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(guided, "sample_latents", lambda *_: (_ for _ in ()).throw(error))
        failed = make(maker)
    assert (failed.code, failed.broken) == (code, False) and message in failed.message
    # A bug keeps its traceback, for who runs the server.
    assert ("Traceback" in capsys.readouterr().err) == (code == "internal_error")
    assert isinstance(make(maker), Made)


def test_a_disk_that_is_full_is_not_the_clients_mistake(maker, monkeypatch, capsys):
    def fails(path, *_):
        raise InputError(f"{path} cannot be written (No space left on device); free some space")

    with monkeypatch.context() as patch:
        patch.setattr(maker_module, "write_with_sidecar", fails)
        failed = make(maker)
    said = "the server cannot write the video: video.mp4 cannot be written (No space left on device); free some space"
    assert (failed.code, failed.message, failed.broken) == ("internal_error", said, False)
    assert "Traceback" not in capsys.readouterr().err


def test_a_device_that_does_nothing_more_is_broken(maker, monkeypatch):
    def fails(*_, **__):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(guided, "sample_latents", fails)
    assert not make(maker).broken
    monkeypatch.setattr(maker_module.torch, "zeros", fails)
    failed = make(maker)
    assert failed.broken and "illegal memory access" in failed.message


def test_files_of_a_client_are_known_by_their_names(maker, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (64, 48)).save(picture, "PNG")
    order = Order("video_1", SMALL, {"image": InputFile("cat.png", picture.getvalue())})
    failed = maker.make(order, lambda progress: None, lambda: False)
    assert failed.code == "invalid_request" and failed.message.startswith("image cat.png is not taken by")
    outside = Order("video_1", SMALL, {"image": InputFile("../../cat.png", b"no picture")})
    failed = maker.make(outside, lambda progress: None, lambda: False)
    assert failed.message.startswith("image cat.png")


def test_pictures_of_a_video_show_its_begin_and_its_moments():
    frames = torch.arange(81, dtype=torch.uint8)[:, None, None, None].expand(81, 20, 1000, 3).numpy()
    first = Image.open(io.BytesIO(thumbnail(frames)))
    assert first.size == (512, 10) and max(first.convert("L").getextrema()) <= 2
    sheet = Image.open(io.BytesIO(sprite_sheet(frames)))
    assert sheet.size == (4 * 256, 4 * 5)
    last = sheet.convert("L").getpixel((sheet.width - 10, sheet.height - 3))
    assert abs(last - 80) <= 3
