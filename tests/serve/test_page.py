"""The page without a browser: its form, and where its settings come from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import weight_files
from PIL import Image
from stand_in_maker import ThreadEngine

import app
from nabla import InputError, NablaConfig
from wan.config.cache_settings import CacheSettings
from wan.config.config_files import CONFIG_FOLDER
from wan.config.model_settings import LoraFile, ModelSettings
from wan.config.settings import Settings, VideoSettings, resolve
from wan.files.atomic import LOCK
from wan.files.picture import picture_hash
from wan.models import recognise as recognition
from wan.models.family import MediaInputs
from wan.models.wan.family import WAN
from wan.models.wan.random_checkpoint import random_transformer
from wan.serve.jobs.job import Status, Wish
from wan.serve.jobs.queue import Queue
from wan.serve.lora_library import LoraLibrary
from wan.serve.page import pictures
from wan.serve.page.form import (
    DENSE,
    SHARE,
    THRESHOLD,
    WINDOW,
    parse_scales,
    to_algorithm,
    to_controls,
    to_form,
    to_layer,
)
from wan.serve.page.pictures import picture_notes, pictures_taken, thumbnail_of, with_picture
from wan.serve.page.sidecars import MAX_SIDECAR_BYTES, from_sidecar, quantization_notes, read_sidecar
from wan.serve.presets import OWN, Presets

SMALL = {"sampling": {"steps": 2, "seed": 1}, "video": {"size": "64*48", "frame_num": 5}, "prompt": "A red circle"}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIG_FOLDER.glob("*.yaml")))
def test_a_form_that_nobody_touched_gives_its_settings_back(name):
    settings = Presets({}, "x", name).settings(Path(name).stem)
    layer = to_layer(to_form(settings, "a cat"), settings, {})
    assert resolve(layer) == replace(settings, prompt="a cat")


def test_every_control_of_the_form_changes_what_it_names_and_nothing_else(tmp_path):
    attention = NablaConfig(threshold=0.7, mask_refresh=2, dense_layers=(1,))
    base = Settings(ModelSettings("here", attention=attention, dtype="bfloat16", fp8=True, vae_dtype="float16"), "x")
    form = replace(
        to_form(base, "a cat"),
        negative_prompt="night",
        size="64x48",
        frame_num=5.0,
        seed=" 7 ",
        steps=3,
        guide_scale=1.5,
        shift=2.0,
        solver="dpm++",
        lora=("b.safetensors", "a.safetensors"),
        scales="0.5, 1",
        algorithm="keep-0.2_sta-3-3-3",
        dense_steps=1,
        mask_refresh=3,
        backend="flex",
    )
    files = {f"{name}.safetensors": str(tmp_path / f"{name}.safetensors") for name in "abc"}
    made = resolve(to_layer(form, base, files))
    assert made.attention == NablaConfig(
        keep=0.2, window=(3, 3, 3), dense_steps=1, mask_refresh=3, backend="flex", dense_layers=(1,)
    )
    assert (made.sampling.steps, made.sampling.guide_scale, made.sampling.shift) == (3, 1.5, 2.0)
    assert (made.sampling.solver, made.sampling.seed, made.sampling.negative_prompt) == ("dpm++", 7, "night")
    assert made.video == VideoSettings((64, 48), 5, base.video.fps)
    assert made.lora == (LoraFile(files["b.safetensors"], 0.5), LoraFile(files["a.safetensors"], 1.0))
    assert (made.checkpoint, made.dtype, made.fp8, made.vae_dtype) == ("here", "bfloat16", True, "float16")


def test_float8_and_the_cache_of_a_preset_are_shown_and_switched():
    fast = Presets({}, "x", "fast.yaml").settings("fast")
    form = to_form(fast, "a cat")
    assert form.fp8 and form.cache
    plain = resolve(to_layer(replace(form, fp8=False, cache=False), fast, {}))
    assert plain == replace(fast, prompt="a cat", model=replace(fast.model, fp8=False, cache=None))
    again = resolve(to_layer(replace(to_form(plain, "a cat"), cache=True), plain, {}))
    assert again.cache == CacheSettings("first_block") and not again.fp8


@pytest.mark.parametrize(
    "change, message",
    (
        ({"prompt": " "}, "the prompt is empty; say what the video should show"),
        ({"steps": None}, "steps is empty; give a number"),
        ({"steps": 2.5}, "steps 2.5 is not a whole number"),
        ({"size": "huge"}, "size 'huge' is not of the form width*height"),
        ({"frame_num": 6}, "frame_num 6 is not of the form 4n+1; use 5 or 9"),
        ({"seed": "1e3"}, "seed '1e3' is not a whole number; leave it empty to draw one"),
        ({"seed": "-5"}, "seed -5 is not a whole number from 0"),
        ({"algorithm": "sparse"}, "attention algorithm 'sparse' is not known"),
        ({"lora": ("../x.safetensors",)}, "lora ../x.safetensors is not here; add the file"),
        ({"lora": ("a",), "scales": "much"}, "lora scales 'much' are not numbers"),
        ({"lora": ("a",), "scales": "1, 2"}, "lora scales '1, 2' are 2, for 1 files"),
    ),
)
def test_wrong_controls(change, message):
    base = Settings(ModelSettings("here"), "x")
    with pytest.raises(InputError, match="^") as error:
        resolve(to_layer(replace(to_form(base, "a cat"), **change), base, {"a": "/a.safetensors"}))
    assert message in str(error.value)


def test_scales_of_loras():
    assert parse_scales("", 2) == [1, 1] and parse_scales("0.5", 3) == [0.5] * 3
    assert parse_scales("0.5; 2", 2) == [0.5, 2] and parse_scales("0.5", 0) == []


@pytest.mark.parametrize(
    "algorithm, controls",
    (
        ("dense", (DENSE, 0.7, "")),
        ("nabla-0.7", (THRESHOLD, 0.7, "")),
        ("keep-0.2", (SHARE, 0.2, "")),
        ("sta-18-3-3", (WINDOW, 0.7, "18-3-3")),
        ("nabla-0.6_sta-11-3-3", (THRESHOLD, 0.6, "11-3-3")),
        ("keep-0.25_sta-11-5-5", (SHARE, 0.25, "11-5-5")),
    ),
)
def test_the_controls_of_attention_and_its_string_say_the_same(algorithm, controls):
    assert to_controls(algorithm) == controls and to_algorithm(*controls) == algorithm


def test_controls_of_attention_that_are_half_filled():
    assert to_algorithm(WINDOW, None, " ") == "sta-11-3-3"
    assert to_algorithm(SHARE, None, "3x5x5") == "keep-0.2_sta-3-5-5"
    # What has no control stays while it has a use.
    before = "nabla-0.7_max-0.3_pool-1-4-4_dropped-mean_sta-11-3-3"
    assert to_algorithm(THRESHOLD, 0.8, "", before) == "nabla-0.8_max-0.3_pool-1-4-4_dropped-mean"
    assert to_algorithm(SHARE, 0.3, "3-5-5", before) == "keep-0.3_pool-1-4-4_dropped-mean_sta-3-5-5"
    assert (
        to_algorithm(WINDOW, None, "", before) == "dropped-mean_sta-11-3-3"
        and to_algorithm(DENSE, 1, "", before) == "dense"
    )
    with pytest.raises(InputError, match="'sta-3-5' is not known"):
        to_controls(to_algorithm(WINDOW, None, "3, 5"))


def test_presets_rank_below_flags_and_above_a_checkpoint_s_own(damaged):
    (damaged / "defaults.yaml").write_text("sampling: {steps: 8}\nvideo: {size: [64, 64], frame_num: 17}\n")
    presets = Presets({"checkpoint": str(damaged), "dtype": "bfloat16"}, "x", "turbo.yaml")
    assert presets.first == "turbo" and presets.names[0] == OWN and "nabla_0.7" in presets.names
    own, turbo = presets.settings(OWN), presets.settings("turbo")
    assert (own.sampling.steps, own.video.size, own.attention.algorithm) == (8, (64, 64), "dense")
    assert (turbo.sampling.steps, turbo.video.size, turbo.attention.algorithm) == (4, (64, 64), "nabla-0.7")
    assert own.checkpoint == turbo.checkpoint == str(damaged) and turbo.dtype == "bfloat16"
    assert presets.checkpoints() == {str(damaged)}
    assert presets.describe("turbo").startswith("For weights distilled to four steps") and not presets.describe(OWN)
    with pytest.raises(InputError, match="preset '../x' is not known"):
        presets.settings("../x")
    with pytest.raises(InputError, match="config 'none.yaml' is neither"):
        Presets({}, "x", "none.yaml")


def test_a_record_comes_back_as_it_was_but_names_no_files(tmp_path):
    own = Settings(ModelSettings("here", transformer="/w.safetensors"), "x")
    lora = [{"file": "/elsewhere/a.safetensors", "scale": 0.5}, {"file": "/etc/b.safetensors", "scale": 1.0}]
    made = resolve(
        SMALL, {"checkpoint": "/etc", "lora": lora, "dtype": "bfloat16", "attention": {"algorithm": "keep-0.2"}}
    )
    path = tmp_path / "video.json"
    path.write_text(json.dumps({"settings": made.to_dict(), "made_with": {}}))
    flags, files = {"dtype": "float32"}, {"a.safetensors": "/loras/a.safetensors"}
    loaded, notes = from_sidecar(read_sidecar(path), own, flags, {"here"}, files)
    assert (loaded.prompt, loaded.video, loaded.sampling) == (made.prompt, made.video, made.sampling)
    assert loaded.attention == made.attention
    assert (loaded.checkpoint, loaded.transformer, loaded.dtype) == ("here", "/w.safetensors", "float32")
    assert loaded.lora == (LoraFile("/loras/a.safetensors", 0.5),)
    assert notes == [
        "the video was made with /etc, and this page runs here",
        "the video was made with transformer None, and this page runs w.safetensors",
        "LoRA b.safetensors is not here; add the file",
        "the video was made in bfloat16, and this page runs float32",
    ]
    assert from_sidecar(read_sidecar(path), own, {}, {"here", "/etc"}, files)[0].checkpoint == "/etc"


def test_a_record_of_packed_weights_says_so():
    plan = {"packing": "int4", "text_packing": "int8", "kept": 3}
    assert quantization_notes({"plan": plan}) == [
        "the video was made with the transformer in int4 and the text encoder in int8, "
        "and this page packs weights only as its --memory asks"
    ]
    for made_with in ({}, {"plan": "whole"}, {"plan": {"packing": "fp8"}}):
        assert quantization_notes(made_with) == []


def test_the_picture_of_a_record_is_never_opened_and_that_of_the_page_stays(tmp_path):
    Image.new("RGB", (1000, 500)).save(tmp_path / "own.png")
    own = Settings(ModelSettings("here"), image=str(tmp_path / "own.png"))
    record = resolve({"checkpoint": "here", "prompt": "x", "image": "/secret/cat.png"}).to_dict()
    settings, notes = from_sidecar(record, own, {}, {"here"}, {})
    assert settings.image == own.image and not notes
    made_with = {"image": {"name": "cat.png", "sha256": picture_hash(own.image)}}
    assert picture_notes(record, made_with, settings) == []
    line = "the video began with the picture cat.png, which is not here; add it"
    assert picture_notes(record, {}, settings) == picture_notes(record, made_with, replace(own, image=None)) == [line]
    text = resolve({"checkpoint": "here", "prompt": "x"}).to_dict()
    assert from_sidecar(text, own, {}, {"here"}, {})[0].image is None and picture_notes(text, {}, own) == []
    assert thumbnail_of(tmp_path / "own.png").shape == (256, 512, 3)


def test_a_last_picture_and_a_size_that_is_exact(tmp_path):
    Image.new("RGB", (830, 470)).save(tmp_path / "like.png")
    Image.new("RGB", (480, 832)).save(tmp_path / "tall.png")
    exact = Settings(ModelSettings("here"), video=VideoSettings((832, 464), exact_size=True))
    # A record's picture is added again: its size stays; another's form asks for another size.
    like, thumbnail = with_picture(exact, "image", tmp_path / "like.png")
    assert like.image == str(tmp_path / "like.png") and like.video.exact_size and thumbnail.shape[1] == 512
    tall = with_picture(exact, "image", tmp_path / "tall.png")[0]
    assert not tall.video.exact_size and tall.video.size == (832, 464)
    both = with_picture(like, "last_image", tmp_path / "tall.png")[0]
    assert both.video.exact_size and both.inputs.keys() == {"image", "last_image"}
    form = to_form(both, "A cat")
    assert to_layer(form, both, {})["video"]["exact_size"] is True
    assert to_layer(replace(form, size="1280x720"), both, {})["video"]["exact_size"] is False


def test_files_of_a_record_that_the_page_does_not_take_are_said():
    own = Settings(ModelSettings("here"))
    record = resolve({"checkpoint": "here", "prompt": "x", "src_video": "/secret/cat.mp4", "last_image": "/b.png"})
    settings, notes = from_sidecar(record.to_dict(), own, {}, {"here"}, {})
    assert not settings.inputs and not notes
    assert picture_notes(record.to_dict(), {}, settings) == [
        "the video ended with the picture b.png, which is not here; add it",
        "the video was made of src_video cat.mp4, which this page does not take",
    ]


def pictured_family():
    """One whose checkpoints may make videos of text or of pictures."""
    inputs = {"text": MediaInputs(), "pictured": MediaInputs(required=frozenset({"image"}))}
    either = MediaInputs(optional=frozenset({"image"}))
    return replace(
        WAN,
        kinds_of=lambda layout: frozenset(inputs),
        inputs_of=lambda layout, kind: inputs.get(kind, MediaInputs() if layout is None else either),
    )


def kind_of(settings, kind):
    return replace(settings, model=replace(settings.model, kind=kind))


def test_pictures_are_for_families_that_take_them(random_nano, monkeypatch):
    settings = Settings(ModelSettings(str(random_nano)))
    assert not pictures_taken(settings)
    monkeypatch.setattr(recognition, "FAMILIES", (pictured_family(),))
    assert pictures_taken(settings) == {"image"} and not pictures_taken(kind_of(settings, "text"))
    monkeypatch.setattr(pictures, "FAMILIES", (WAN, pictured_family()))
    on_hub = Settings(ModelSettings("a/b"))
    assert pictures_taken(kind_of(on_hub, "pictured")) == {"image"} and not pictures_taken(on_hub)


def test_the_cache_of_a_record_is_taken_too_but_no_file_of_ratios():
    own = Settings(ModelSettings("here", cache="first_block"), "x")
    for cache in (None, "first_block:0.1", {"kind": "mag", "ratios": [1.0, 0.9]}):
        made = resolve(SMALL, {"checkpoint": "here", "cache": cache})
        assert from_sidecar(made.to_dict(), own, {}, {"here"}, {})[0].cache == made.cache
    for cache in ("mag:0.06:/etc/passwd", {"kind": "mag", "ratios": "/etc/passwd"}):
        with pytest.raises(InputError, match="cache names a file of ratios"):
            from_sidecar(SMALL | {"checkpoint": "here", "cache": cache}, own, {}, {"here"}, {})


@pytest.mark.parametrize(
    "content, message",
    (
        ("", "config video.json cannot be read"),
        ("[1]", "config video.json does not hold a mapping of settings"),
        ("[" * 5000, "video.json cannot be read: it is nested more than 100 deep"),
        ('{"settings": {}}' + " " * MAX_SIDECAR_BYTES, "video.json is larger than 64 KB"),
    ),
)
def test_a_file_that_is_no_record(tmp_path, content, message):
    (tmp_path / "video.json").write_text(content)
    with pytest.raises(InputError) as error:
        read_sidecar(tmp_path / "video.json")
    assert message in str(error.value) and str(tmp_path) not in str(error.value)


def test_a_record_is_only_read_as_json(tmp_path):
    (tmp_path / "video.yaml").write_text("prompt: a cat")
    with pytest.raises(InputError, match="video.yaml is not the JSON file beside a video"):
        read_sidecar(tmp_path / "video.yaml")


def test_a_library_takes_safetensors_and_nothing_else(tmp_path, monkeypatch):
    library, upload = LoraLibrary(tmp_path / "loras"), tmp_path / "my style!.safetensors"
    factors = weight_files.draw_factors(random_transformer("nano", torch.float32, torch.device("cpu")))
    weight_files.write_lora(upload, factors, "wan")
    name = library.add(upload)
    assert name.startswith("my-style-") and library.files() == {name: str(tmp_path / "loras" / name)}
    assert library.add(upload) == name == library.add(Path(library.files()[name]))
    torch.save({"x": torch.zeros(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="^bad.safetensors is truncated or corrupt"):
        library.add(tmp_path / "bad.safetensors")
    shutil.copy(upload, tmp_path / "style.pt")
    with pytest.raises(InputError, match="style.pt must end in .safetensors; other formats can hold code"):
        library.add(tmp_path / "style.pt")
    assert list(library.files()) == [name]

    def copied_to_a_full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copied_to_a_full_disk)
        with pytest.raises(
            InputError, match="my style!.safetensors cannot be kept .No space left on device.; see --lora"
        ):
            library.add(upload)


def test_without_gradio_the_program_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert app.main([]) == 2
    assert capsys.readouterr().err == "error: the page needs gradio; pip install -r requirements-page.txt\n"


@pytest.mark.parametrize(
    "flags, message",
    (
        ("--config none.yaml", "config 'none.yaml' is neither a file nor one of fast.yaml, full"),
        ("--port 99999", "port 99999 is not one of 1 to 65535; leave it out to take a free one"),
        ("--port 0", "port 0 is not one of 1 to 65535"),
        ("--ckpt_dir nowhere", "checkpoint 'nowhere' is neither a directory nor a hub id of the form owner/name"),
        ("--ckpt_dir {0}", "{0}/config.json"),
        ("--lora_dir {0}/file/loras", "lora_dir {0}/file/loras cannot be made (Not a directory); choose another"),
    ),
)
def test_a_wrong_start_is_one_line(flags, message, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-page.txt")
    monkeypatch.setattr("wan.serve.page.server.gr.Blocks.launch", lambda *_, **__: pytest.fail("the page was served"))
    (tmp_path / "file").touch()
    assert app.main(["--save_dir", str(tmp_path / "videos"), *flags.format(tmp_path).split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message.format(tmp_path)}") and said.count("\n") == 1


def test_an_interrupted_start_is_one_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-page.txt")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("wan.serve.page.server.gr.Blocks.launch", interrupted)
    monkeypatch.setattr("wan.serve.workers.local_engine.LocalEngine", lambda make: ThreadEngine())
    assert app.main(["--save_dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_videos_are_made_unless_a_server_makes_those_of_the_folder(random_nano, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-page.txt")
    queue, ended = Queue.open(tmp_path), []

    def served(*_, **__):
        [job] = queue.submit([Wish("small", {})])
        ended.append(queue.wait(job.id, "", 20 if not ended else 0.3).status)

    monkeypatch.setattr("wan.serve.page.server.serve", served)
    monkeypatch.setattr("wan.serve.workers.local_engine.LocalEngine", lambda make: ThreadEngine())
    flags = ["--ckpt_dir", str(random_nano), "--save_dir", str(tmp_path)]
    assert app.main(flags) == 0 and not capsys.readouterr().err
    # By another process, for this one may have a file's lock twice; it takes what `lock_folder` does.
    holder = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True)"
    )
    holds = [sys.executable, "-c", f"{holder}; sys.stdin.read()", str(tmp_path / LOCK)]
    with subprocess.Popen(holds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "held\n"
        assert app.main(flags) == 0
        server.stdin.close()
    assert (
        capsys.readouterr().err == f"the server of {tmp_path} makes its videos, by its own flags of memory and device\n"
    )
    assert ended == [Status.COMPLETED, Status.QUEUED]


def test_presets_for_other_kinds_of_checkpoint_than_the_given_one_are_left_out(random_nano, kandinsky_nano):
    for folder, there, gone in (
        (random_nano, "nabla_0.7", "kandinsky5_lite_sft_5s"),
        (kandinsky_nano, "kandinsky5_lite_sft_5s", "kandinsky5_pro_i2v_5s_hd"),
    ):
        presets = Presets({"checkpoint": str(folder)}, "x")
        assert there in presets.names and gone not in presets.names
        # All that are offered can be chosen.
        assert all(map(presets.settings, presets.names))
    asked = Presets({"checkpoint": str(random_nano)}, "x", "kandinsky5_lite_sft_5s.yaml")
    with pytest.raises(InputError, match="the settings are for kandinsky5-lite-t2v"):
        asked.settings(asked.first)
