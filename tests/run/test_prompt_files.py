"""Files of prompts: what a line may say, names of videos, and which of them are made already."""

from __future__ import annotations

import json
import re

import pytest

import generate
from nabla import InputError
from wan.config.settings import resolve
from wan.run.jobs import name_of, names_of, read_prompts

SMALL = "--size 64*48 --frame_num 5 --sample_steps 2 --base_seed 1 --device cpu --sparse_algo nabla-0.5".split()


@pytest.fixture
def run_prompts(random_nano, tmp_path, capsys):
    """Make the videos of prompts by one process, and return what it says."""

    def run(prompts: str, *flags: str, code: int = 0) -> str:
        (tmp_path / "prompts.txt").write_text(prompts)
        files = ["--prompt_file", str(tmp_path / "prompts.txt"), "--save_dir", str(tmp_path)]
        assert generate.main([*files, "--ckpt_dir", str(random_nano), *SMALL, *flags]) == code
        return capsys.readouterr().err

    return run


def test_names_of_prompts_are_those_that_lines_give(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('\ufeff{"prompt": "A cat", "name": "A-dog.mp4"}\nA dog\n\nA cat, asleep\r\n', encoding="utf-8")
    assert [name for _, name in read_prompts(path)] == ["A-dog", None, None]


def test_a_name_belongs_to_what_a_video_shows():
    def settings(**values):
        return resolve({"checkpoint": "a/b", "prompt": "A cat, asleep!"} | values)

    own = name_of(settings())
    assert re.fullmatch("A-cat-asleep-[0-9a-f]{8}", own) and name_of(settings(sampling={"seed": -1})) == own
    others = (
        {"prompt": "A cat, asleep?"},
        {"sampling": {"seed": 1}},
        {"sampling": {"steps": 3}},
        {"video": {"fps": 8}},
        {"lora": ["x.safetensors"]},
    )
    assert len({own, *(name_of(settings(**other)) for other in others)}) == 6
    assert names_of([settings(), settings(sampling={"seed": 1}), settings()])[::2] == [own, f"{own}-2"]


@pytest.mark.parametrize(
    "line, message",
    (
        ('{"prompt": "A cat"', "line 2: not a JSON object"),
        ('{"prompt": "A cat", "steps": 3}', "line 2: 'steps' is not known"),
        ('{"prompt": "A cat", "size": "17*16"}', "line 2: size 17.16"),
        ('{"seed": 3}', "line 2: the prompt is empty; say what the video should show in this line$"),
        ("&nbsp;", "line 2: the prompt is empty; say what the video should show in this line$"),
        ('{"prompt": "A cat", "name": "../cat"}', "line 2: name '../cat' is not a plain file name"),
        ('{"prompt": "A cat", "name": "a\\u0000"}', "line 2: name .* is not a plain file name"),
        ('{"prompt": "A cat", "name": "\\ud800"}', "line 2: name .* is not a plain file name"),
        ('{"prompt": "A cat", "name": "one"}', "lines 1 and 2: both are named 'one'"),
    ),
)
def test_wrong_lines_of_a_prompt_file(line, message, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('{"prompt": "A dog", "name": "one"}\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_prompts(path)


def test_what_is_made_is_decided_by_records_and_stays(run_prompts, tmp_path):
    run_prompts("A cat\nA cat\n")
    first = {path: path.read_bytes() for path in tmp_path.glob("A-cat-*.mp4")}
    assert len(first) == 2 and "2 are made already" in run_prompts("A cat\nA cat\n")
    assert "0 are made already" in run_prompts("A cat", "--sample_steps", "3")
    assert "of which 2 are made already" in run_prompts("A dog\nA cat\nA cat\n")
    moved, other = list(first)
    for path in (moved, moved.with_suffix(".json")):
        path.rename(path.with_stem("mine"))
    record = json.loads((tmp_path / "mine.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(record | {"file": record["file"] | {"name": "mine.mp4"}}))
    assert "2 are made already" in run_prompts("A cat\nA cat\n")
    assert (tmp_path / "mine.mp4").read_bytes() == first[moved] and other.read_bytes() == first[other]


def test_a_named_video_made_otherwise_is_replaced_only_if_told(run_prompts, tmp_path):
    line = '{"prompt": "A cat", "name": "one"}'
    run_prompts(line)
    first = (tmp_path / "one.mp4").read_bytes()
    assert "1 are made already" in run_prompts(line)
    said = run_prompts(line, "--sample_steps", "3", code=2)
    assert "one.mp4 is there already; give --overwrite to replace it, or choose another name" in said
    assert (tmp_path / "one.mp4").read_bytes() == first
    run_prompts(line, "--sample_steps", "3", "--overwrite")
    assert (tmp_path / "one.mp4").read_bytes() != first
