"""What videos are made of beside prompts, as flags, configs, files of prompts and records have it; and tasks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import DATA
from PIL import Image

import generate
from nabla import InputError
from wan import Checkpoint
from wan.config.inputs import INPUTS
from wan.config.settings import resolve
from wan.files.picture import picture_hash
from wan.models.wan.family import WAN
from wan.run.flags import INPUT_FLAGS, flag_settings, parse_args, request_of
from wan.run.inputs import other_files
from wan.run.jobs import name_of, read_prompts
from wan.run.sidecars import Sidecar, comparable
from wan.run.tasks import TASKS

ROOM = {"checkpoint": "x", "prompt": "A cat"}
FILES = {"image": "a.png", "last_image": "b.png", "src_video": "c.mp4", "src_mask": "d.mp4"}


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Two pictures in the working directory, a.png and b.png."""
    monkeypatch.chdir(tmp_path)
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), color).save(name)
    return tmp_path


def flags_of(*argv: str) -> dict:
    return flag_settings(parse_args([*argv]))


def test_the_flags_are_the_settings():
    assert INPUT_FLAGS == INPUTS


def test_files_are_absolute_and_stand_in_a_record_where_they_are_given(pictures):
    settings = resolve(ROOM | FILES | {"src_ref_images": ["a.png", "b.png"]})
    absolute = {name: str(pictures / file) for name, file in FILES.items()}
    assert settings.inputs == absolute | {"src_ref_images": (str(pictures / "a.png"), str(pictures / "b.png"))}
    assert resolve(json.loads(json.dumps(settings.to_dict()))) == settings
    assert not resolve(ROOM).to_dict().keys() & set(INPUTS) and resolve(ROOM | {"src_ref_images": []}) == resolve(ROOM)
    # As what belongs to a prompt, they are left out with it.
    assert not resolve(ROOM | FILES, needs_prompt=False).inputs


def test_what_came_later_is_in_no_record_by_default():
    plain = resolve(ROOM).to_dict()
    assert "context_scale" not in plain["sampling"] and "exact_size" not in plain["video"]
    given = resolve(ROOM | {"sampling": {"context_scale": 0.5}, "video": {"exact_size": True}})
    assert given.to_dict()["sampling"]["context_scale"] == 0.5 and given.to_dict()["video"]["exact_size"] is True
    assert resolve(given.to_dict()) == given and name_of(given) != name_of(resolve(ROOM))


@pytest.mark.parametrize(
    "layer, said",
    (
        ({"last_image": 3}, "last_image 3 is not the path of a file"),
        ({"src_ref_images": "a.png"}, "src_ref_images 'a.png' is not a list of files; put even one in brackets"),
        ({"src_ref_images": [""]}, "src_ref_images '' is not the path of a file"),
        ({"video": {"exact_size": "yes"}}, "exact_size 'yes' is neither true nor false"),
        ({"sampling": {"context_scale": -1}}, "context_scale -1 is not a number from 0 to 10; 1.0 is usual"),
    ),
)
def test_what_is_no_file_is_a_line(layer, said):
    with pytest.raises(InputError, match=f"^{said}$"):
        resolve(ROOM | layer)


def test_flags_as_settings():
    given = flags_of("--last_image", "b.png", "--src_ref_images", "a.png, b.png", "--src_ref_images", "c.png")
    assert given["last_image"] == "b.png" and given["src_ref_images"] == ["a.png", "b.png", "c.png"]
    assert "image" not in flags_of("--prompt", "A cat")
    assert flags_of("--exact_size")["video"] == {"exact_size": True}
    assert flags_of("--exact_size", "false", "--size", "8*8")["video"] == {"size": "8*8", "exact_size": False}
    sampling = flags_of("--context_scale", "0.5", "--sample_guide_scale", "3.0,4")["sampling"]
    assert sampling == {"context_scale": 0.5, "guide_scale": [3.0, 4.0]}
    assert flags_of("--sample_guide_scale", "3")["sampling"] == {"guide_scale": 3.0}


@pytest.mark.parametrize(
    "given, transformer",
    (
        (["a:b.gguf"], "a:b.gguf"),
        (["high:a.gguf", "low:b.gguf"], {"high": "a.gguf", "low": "b.gguf"}),
        (["low:b.gguf"], {"low": "b.gguf"}),
    ),
)
def test_transformers_of_experts(given, transformer):
    assert flags_of(*(word for file in given for word in ("--transformer", file)))["transformer"] == transformer


@pytest.mark.parametrize(
    "flags, said",
    (
        ("--transformer a.gguf --transformer b.gguf", "a.gguf, b.gguf: give one file, or high:FILE and low:FILE"),
        ("--transformer high:a.gguf --transformer b.gguf", "high:a.gguf, b.gguf: give one file, or high:FILE and low"),
        ("--transformer low:a.gguf --transformer low:b.gguf", "low:a.gguf, low:b.gguf: give one file"),
        ("--sample_guide_scale 1,2,3", "'1,2,3' is neither a number nor low and high noise's, such as 3.0,4.0"),
        ("--sample_guide_scale high", "'high' is neither a number nor low and high noise's"),
        ("--src_ref_images a.png,,b.png", "'a.png,,b.png' lacks the name of a file; give FILE, or FILE,FILE"),
        ("--src_ref_images=", "'' lacks the name of a file"),
    ),
)
def test_flags_that_mean_nothing_are_a_line(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(flags.split())
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and said in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    "flags, checkpoint",
    (
        ("--task i2v-14B", "Wan-AI/Wan2.1-I2V-14B-720P"),
        ("--task i2v-14B --size 1280*720", "Wan-AI/Wan2.1-I2V-14B-720P"),
        ("--task i2v-14B --size 832*480", "Wan-AI/Wan2.1-I2V-14B-480P"),
        ("--task i2v-14B --size 480x832", "Wan-AI/Wan2.1-I2V-14B-480P"),
        ("--task vace-14B --size 832*480", "Wan-AI/Wan2.1-VACE-14B"),
        ("--task ti2v-5B", "Wan-AI/Wan2.2-TI2V-5B"),
        ("--task t2i-14B", "Wan-AI/Wan2.1-T2V-14B"),
    ),
)
def test_tasks_pick_checkpoints(flags, checkpoint):
    assert request_of(parse_args(flags.split())).default_checkpoint == checkpoint


def test_a_file_of_prompts_has_files_of_its_own(tmp_path):
    line = {"prompt": "A cat", "last_image": "b.png", "src_ref_images": ["a.png"], "exact_size": True}
    (tmp_path / "prompts.txt").write_text(json.dumps(line | {"context_scale": 0.5}))
    [(layer, name)] = read_prompts(tmp_path / "prompts.txt")
    assert name is None and layer["last_image"] == "b.png" and layer["src_ref_images"] == ["a.png"]
    assert layer["video"] == {"exact_size": True} and layer["sampling"] == {"context_scale": 0.5}
    for key, value in (("src_ref_images", "a.png"), ("exact_size", 1), ("context_scale", "much")):
        (tmp_path / "prompts.txt").write_text(json.dumps({"prompt": "A cat", key: value}))
        with pytest.raises(InputError, match=f"line 1: {key} {value!r} is "):
            read_prompts(tmp_path / "prompts.txt")


def test_records_know_files_by_what_is_in_them(pictures):
    given = {"image": "a.png", "src_ref_images": ["a.png", "b.png"]}
    settings = resolve(ROOM | given)
    red, blue = picture_hash("a.png"), picture_hash("b.png")
    assert comparable(settings)["image"] == red and comparable(settings)["src_ref_images"] == [red, blue]
    made_with = {"image": {"sha256": red}, "src_ref_images": [{"sha256": red}, {"sha256": blue}]}
    (pictures / "out.json").write_text(json.dumps({"settings": settings.to_dict(), "made_with": made_with}))
    assert Sidecar.read(pictures / "out.json").is_of(comparable(settings)) and other_files("out.json", settings) == []
    (pictures / "b.png").write_bytes((pictures / "a.png").read_bytes())
    [line] = other_files("out.json", settings)
    assert line.startswith("out.json was made from other pictures than those of src_ref_images are now, so this video")
    assert not Sidecar.read(pictures / "out.json").is_of(comparable(settings))
    swapped = replace(settings, src_ref_images=settings.src_ref_images[::-1])
    assert name_of(swapped) == name_of(settings)


def test_a_task_refuses_what_is_for_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kind.yaml").write_text("kind: vace")
    (tmp_path / "hub.yaml").write_text("checkpoint: Wan-AI/Wan2.1-T2V-14B")

    def said(*flags: str) -> str:
        assert generate.main(["--prompt", "A cat", "--device", "cpu", *flags]) == 2
        return capsys.readouterr().err

    assert said("--task", "i2v-14B", "--config", "kind.yaml").endswith(
        "error: task i2v-14B: config kind.yaml is for vace; leave --task out, or give another --config\n"
    )
    assert said("--task", "i2v-14B", "--config", "hub.yaml").endswith(
        "error: task i2v-14B: config hub.yaml names Wan-AI/Wan2.1-T2V-14B; leave --task out, or choose with "
        "--ckpt_dir\n"
    )
    assert said("--task", "t2v-1.3B", "--config", "hub.yaml").startswith("error: task t2v-1.3B: config hub.yaml names")
    other = replace(WAN, kinds_of=lambda layout: frozenset({"ti2v-5B"}))
    monkeypatch.setattr("wan.run.settle.Checkpoint", _Found(Checkpoint("here", tmp_path, True, {}, other)))
    assert said("--task", "i2v-14B", "--ckpt_dir", "here").endswith(
        "error: task i2v-14B: checkpoint here is ti2v-5B; leave --task out, or choose with --ckpt_dir\n"
    )


def test_settings_that_name_a_checkpoint_are_for_its_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    (tmp_path / "hub.yaml").write_text("checkpoint: Wan-AI/Wan2.1-T2V-14B")
    where = str(DATA / "i2v-nano" / "checkpoint")
    for config in ("hub.yaml", "nabla_0.7.yaml"):
        flags = ["--prompt", "A cat", "--device", "cpu", "--image", "a.png", "--save_file", "out.mp4"]
        assert generate.main([*flags, "--config", config, "--ckpt_dir", where]) == 2
        assert capsys.readouterr().err.endswith(
            f"error: the settings are for t2v and checkpoint {where} is i2v; name another with --ckpt_dir, or a "
            "--config for it\n"
        )
    assert not (tmp_path / "out.mp4").exists()


class _Found:
    """Stands for a class of which one is found whatever is opened."""

    def __init__(self, one: Checkpoint) -> None:
        self.open = lambda *_: one


def test_every_task_is_of_a_kind_and_a_checkpoint():
    assert all(task.checkpoint.startswith("Wan-AI/Wan2.") and task.kind for task in TASKS.values())
