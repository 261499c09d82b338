"""Each kind of Wan by its own config, as a user runs it, on random weights in both layouts; and every config."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image
from wan_family_sets import with_tokenizer

import generate
import wan
from wan import Checkpoint
from wan.config.config_files import CONFIG_FOLDER, read_settings
from wan.config.sampling_settings import DEFAULT_NEGATIVE_PROMPT
from wan.config.settings import resolve
from wan.models.family import Layout
from wan.models.wan.family import WAN
from wan.models.wan.kinds import KINDS
from wan.run.tasks import kind_on_hub
from wan.sampling.solvers import make_solver


@pytest.mark.parametrize("file", sorted(CONFIG_FOLDER.glob("wan2[12]_*.yaml")), ids=lambda file: file.stem)
def test_configs_of_the_wan_family_run_what_their_names_say(file):
    settings = resolve(read_settings(file.name), {"prompt": "a cat"})
    version, task, size, *rest = file.stem.split("_")
    hub = f"Wan-AI/{version[:4].title()}.{version[4]}-{task}-{size}".lower()
    assert settings.checkpoint.lower().replace("-14b-", "-") == hub
    kind = KINDS[kind_on_hub(settings.checkpoint)]
    assert settings.model.kind == kind.name
    # As published, but for what the name says besides.
    own = WAN.defaults(Layout(True, {}, kind.name), settings.video.size)
    published = resolve(read_settings(file.name) | {"sampling": {}}, own, {"prompt": "a cat"}).sampling
    few = rest == ["turbo"]
    assert (settings.sampling == replace(published, negative_prompt=DEFAULT_NEGATIVE_PROMPT)) is not few
    assert settings.video == resolve(own, {"checkpoint": "x", "prompt": "a cat"}).video or kind.name != "ti2v-5B"
    assert settings.attention.algorithm == (f"keep-{rest[1]}_pool-1-4-4" if rest[:1] == ["keep"] else "dense")
    if few:
        timesteps = make_solver("euler", 4, settings.sampling.shift).timesteps
        assert settings.sampling.guide_scale == 1
        assert (timesteps >= 1000 * kind.boundary).tolist() == [True, True, False, False]
    elif rest:
        assert "not tuned for it" in file.read_text().splitlines()[0]
        dense = read_settings(f"{file.stem.removesuffix('_' + '_'.join(rest))}.yaml")
        assert read_settings(file.name) | {"attention": dense["attention"]} == dense


# By the names of their sets, of the config that each is run by: its flags, and the size that its video gets.
RUNS = {
    "i2v": ("wan21_i2v_480p", {"image": "a.png"}, (112, 64)),
    "flf2v": ("wan21_flf2v_720p", {"image": "a.png", "last_image": "b.png"}, (112, 64)),
    "vace": ("wan21_vace_1.3b", {"src_video": "c.mp4", "src_mask": "m.png", "src_ref_images": "a.png,b.png"}, (96, 64)),
    "wan22_t2v": ("wan22_t2v_a14b", {}, (128, 64)),
    "wan22_i2v": ("wan22_i2v_a14b", {"image": "a.png"}, (112, 64)),
    "ti2v_5b": ("wan22_ti2v_5b", {"image": "a.png"}, (96, 64)),
}
TASKS_OF = {"i2v": "i2v-14B", "flf2v": "flf2v-14B", "vace": "vace-14B", "ti2v_5b": "ti2v-5B"}
TASKS_OF |= {"wan22_t2v": "t2v-A14B", "wan22_i2v": "i2v-A14B"}
SMALL = "--size 128*64 --frame_num 9 --base_seed 1 --device cpu --prompt".split() + ["A red circle"]


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """`published(name)`: the folder of a set's tiny checkpoint, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("published")

    @functools.cache
    def published(name: str) -> Path:
        return with_tokenizer(name, folder / name)

    return published


@pytest.fixture(scope="session")
def in_diffusers(published, tmp_path_factory):
    """`in_diffusers(name)`: the same as diffusers' pipelines save it."""
    folder = tmp_path_factory.mktemp("diffusers")

    @functools.cache
    def in_diffusers(name: str) -> Path:
        pipe, layout = wan.from_pretrained(published(name)), Checkpoint.open(published(name)).layout
        index = {"_class_name": KINDS[layout.kind].diffusers_pipeline, "expand_timesteps": layout.kind == "ti2v-5B"}
        index |= {} if layout.boundary is None else {"boundary_ratio": layout.boundary}
        for part in ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder"):
            if (model := getattr(pipe, part)) is not None:
                model.save_pretrained(folder / name / part)
                index[part] = [type(model).__module__.partition(".")[0], type(model).__name__]
        shutil.copytree(published(name) / "google" / "umt5-xxl", folder / name / "tokenizer")
        (folder / name / "model_index.json").write_text(json.dumps(index))
        return folder / name

    return in_diffusers


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(*flags)`: the exit code of generate.py in a folder with pictures a.png and b.png, a video c.mp4 and a mask
    m.png, and what it printed.
    """
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name, (width, height) in {"a.png": (120, 70), "b.png": (64, 64)}.items():
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(name)
    iio.imwrite("c.mp4", generator.integers(0, 256, (11, 64, 96, 3), dtype=np.uint8), fps=16)
    mask = np.zeros((64, 96, 3), np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save("m.png")

    def run(*flags: object) -> tuple[int, str]:
        code = generate.main([str(flag) for flag in flags])
        return code, capsys.readouterr().err

    return run


def files_of(name: str) -> list[str]:
    return [word for flag, file in RUNS[name][1].items() for word in (f"--{flag}", file)]


def settings_of(file: str) -> dict:
    with open(file) as record:
        return json.load(record)["settings"]


@pytest.mark.parametrize("name", RUNS)
def test_each_kind_by_its_config_in_both_layouts_and_again_by_its_record(run, published, in_diffusers, name):
    config, _, size = RUNS[name]
    flags = "--config", f"{config}.yaml", "--sample_steps", 3, *files_of(name), *SMALL
    code, said = run(*flags, "--ckpt_dir", published(name), "--save_file", "out.mp4")
    assert code == 0 and "warning" not in said, said
    assert iio.imread("out.mp4").shape == (9, *size[::-1], 3)
    settings, asked = settings_of("out.json"), resolve(read_settings(f"{config}.yaml"), {"prompt": "x"}).to_dict()
    assert settings["kind"] == asked["kind"] and settings["video"].get("exact_size", False) == bool(files_of(name))
    changed = {"steps": 3, "seed": 1, "negative_prompt": settings["sampling"]["negative_prompt"]}
    assert settings["sampling"] == json.loads(json.dumps(asked["sampling"] | changed))
    # Its record makes it again, and says so of itself.
    code, said = run("--config", "out.json", "--save_file", "again.mp4", "--device", "cpu")
    assert code == 0 and "will differ" not in said and "was asked for" not in said, said
    assert (iio.imread("again.mp4") == iio.imread("out.mp4")).all() and settings_of("again.json") == settings
    code, said = run(*flags, "--ckpt_dir", in_diffusers(name), "--save_file", "other.mp4")
    assert code == 0 and (iio.imread("other.mp4") == iio.imread("out.mp4")).all(), said


@pytest.mark.parametrize("name", RUNS)
def test_each_kind_by_its_task_as_published_programs_are_called(run, published, name):
    code, said = run(
        "--task", TASKS_OF[name], "--ckpt_dir", published(name), *files_of(name), *SMALL, "--sample_steps", 1
    )
    assert code == 0, said
    settings, own = settings_of(next(Path().glob("A-red*.json"))), Checkpoint.open(published(name)).own_sampling()
    assert settings["kind"] is None and settings["sampling"]["shift"] == own.shift
    assert settings["sampling"]["negative_prompt"] == own.negative_prompt


@pytest.mark.parametrize(
    "name, flags, said",
    (
        ("i2v", "", "videos of i2v begin with a picture; give one with --image FILE"),
        ("flf2v", "--image a.png", "videos of flf2v end with a picture; give one with --last_image FILE"),
        ("wan22_t2v", "--image a.png", "a.png is not taken by t2v-A14B, which starts from text alone; leave it out"),
        ("wan22_i2v", "--image m.txt", "m.txt cannot be read (No such file or directory); give a .png, .jpg or .webp"),
        (
            "vace",
            "--src_mask m.png",
            "m.png says which parts of a source video are made anew; give that as --src_video",
        ),
        ("vace", "--src_video a.txt", "a.txt cannot be read (No such file or directory); give an .mp4 that plays"),
        ("ti2v_5b", "--size 128*80", "size 128*80: both must be positive multiples of 32; the nearest below is 128*64"),
        ("ti2v_5b", "--last_image a.png", "a.png is not taken by ti2v-5B, which takes image; leave it out"),
        ("wan22_i2v", "--task i2v-14B", "is i2v-A14B; leave --task out, or choose with --ckpt_dir"),
        (
            "i2v",
            "--image a.png --task t2v-14B",
            "is i2v; leave --task out, or choose with --ckpt_dir",
        ),
        ("i2v", "--config wan21_vace_14b.yaml", "name another with --ckpt_dir, or a --config for it"),
        ("i2v", "--image a.png --sample_guide_scale 3,4", "has one transformer; give one number, such as 4"),
    ),
)
def test_what_does_not_fit_a_kind_is_a_line_before_weights_are_read(run, published, monkeypatch, name, flags, said):
    monkeypatch.setattr(wan.WanT2V, "from_settings", None)
    code, printed = run("--ckpt_dir", published(name), *SMALL, "--save_file", "out.mp4", *flags.split())
    assert code == 2 and printed.endswith(f"{said}\n") and "Traceback" not in printed, printed
    assert not Path("out.mp4").exists() and not Path("out.json").exists()


def test_a_prompt_whose_video_lacks_a_picture_is_named(run, published):
    Path("prompts.txt").write_text('{"prompt": "one", "image": "a.png"}\ntwo\n', encoding="utf-8")
    files = ("--prompt_file", "prompts.txt", "--save_dir", "videos")
    # SMALL has a prompt of its own.
    code, printed = run("--ckpt_dir", published("i2v"), "--size", "64*64", "--frame_num", "5", *files)
    assert code == 2 and not Path("videos").exists()
    assert printed.endswith(
        "error: prompts.txt, 'two': videos of i2v begin with a picture; give one with --image FILE\n"
    )
