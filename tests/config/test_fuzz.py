"""Damaged settings, records and files of prompts end in one clear line, at once, and leave nothing behind.

Whatever is taken can be written as the record of a video, and read from it again.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from nabla import InputError
from wan.config.config_files import read_made_with, read_settings
from wan.config.settings import Settings, resolve
from wan.files.plain_data import parse_json
from wan.run.jobs import read_prompts
from wan.run.request import Request
from wan.run.settle import settle
from wan.training.schema import with_overrides

SETTINGS = {
    "checkpoint": "somewhere",
    "prompt": "a cat",
    "transformer": "file.safetensors",
    "lora": ["one.safetensors:0.5", {"file": "two.safetensors", "scale": 1.0}],
    "dtype": "float32",
    "vae_dtype": "float16",
    "fp8": False,
    "cache": {"kind": "mag", "threshold": 0.1, "ratios": [1.0, 1.1], "max_skips": 2, "measured_on": {"steps": 2}},
    "attention": {"algorithm": "nabla_sta", "threshold": 0.7, "window": [3, 3, 3], "dense_layers": [0, 1]},
    "sampling": {"solver": "dpm++", "steps": 3, "shift": 3.0, "guide_scale": 2.0, "seed": 5, "negative_prompt": "dog"},
    "video": {"size": "32*32", "frame_num": 1, "fps": 8},
}
# Of a checkpoint in reach, which has no files that are not there.
SMALL = {key: SETTINGS[key] for key in ("prompt", "dtype", "cache", "attention", "sampling", "video")}
RECORD = {"settings": SETTINGS, "made_with": {"seconds": {"text": 1.0}, "plan": None}, "file": {"name": "a.mp4"}}
LINE = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 3, "size": "32*32", "frame_num": 5, "name": "one"}

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 2.5, 1e308, -1e-308, 10**60, 2**63, float("nan"), float("inf")),
    *(
        "",
        " ",
        "none",
        "~",
        "~nobody/x",
        "\x1b[2J",
        "a\r\nb",
        "\ud800",
        "\0",
        "n" * 300,
        "x/" * 3000,
        "9" * 5000,
        "0x1p4",
    ),
    *([], {}, [[]], [0], [None], {"": {}}, {"a": [1]}, ["a", 1], {"x": "\u202e"}, [1e308] * 50, "w" * 100_000),
    *("sta-9-9-999999999", "nabla-0", "mag:0.1:none.json", "taylorseer:1e300", "1e5*16", "a:b:c", "file:1e999", "/"),
)
BOMB = "[" + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 10) if n else 'lol'}]" for n in range(9)) + "]"
SNIPPETS = (
    *(
        "[" * 3000,
        "{a: " * 3000,
        '{"a":' * 3000,
        "&a [*a]",
        "&m {x: *m}",
        "*none",
        BOMB,
        "&a [*a",
        "<<: *a",
        "- -",
        "%Y",
    ),
    *(
        "!!int ''",
        "!!float ''",
        "!!bool x",
        "!!map [1]",
        "!!seq x",
        "!!set {a}",
        "!!binary x",
        "!!python/name:os.system",
    ),
    *(
        "0x" + "f" * 5000,
        "9" * 5000,
        "1e9999",
        "-.inf",
        ".nan",
        "NaN",
        "Infinity",
        "2026-01-01",
        "1:30:00",
        "0o17",
        "1_0",
    ),
    *("\ufeff", "\x00", "\x1b[31m", "\x85", "\u2028", '"\\ud800"', '"\\UFFFFFFFF"', "{a: 1, a: 2}", '{"a": 1, "a": 2}'),
    *("? [a]\n: b", "{[a]: b}", "{{a: 1}: 2}", "{1: 2}", "{? x}", "|\n", ">", "'", '"', "#", "\t", "---\n---", "", "@"),
)
MARK = "@@mark@@"


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def replaced(tree: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


def as_json(tree: Any) -> str:
    return json.dumps(tree, indent=1)


def as_line(tree: Any) -> str:
    return json.dumps(tree, ensure_ascii=False)


def as_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False)


@st.composite
def damaged(draw: st.DrawFn, tree: Any, dump: Callable[[Any], str]) -> bytes:
    """The text of a tree with an odd value, an odd piece of text, a line twice, or bytes lost, changed or put in."""
    how = draw(st.sampled_from(("value", "value", "text", "text", "twice", "bytes")))
    if how in ("value", "text"):
        path = draw(st.sampled_from(list(places(tree))))
        if how == "value":
            return dump(replaced(tree, path, draw(st.sampled_from(ODD)))).encode("utf-8", "surrogatepass")
        marked = dump(replaced(tree, path, MARK))
        quoted = next(each for each in (f'"{MARK}"', f"'{MARK}'", MARK) if each in marked)
        return marked.replace(quoted, draw(st.sampled_from(SNIPPETS))).encode()
    content = dump(tree).encode()
    if how == "twice":
        lines = content.splitlines(keepends=True)
        number = draw(st.integers(0, len(lines) - 1))
        return b"".join([*lines[: number + 1], *lines[number:]])
    first, last = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    return content[:first] + draw(st.binary(max_size=8)) + content[last if draw(st.booleans()) else first + 1 :]


def fuzzed(count: int) -> Callable:
    return settings(
        max_examples=count,
        # Explaining traces every line, which the time of each example would be of.
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def taken(read: Callable[[], Any], folder: Path) -> Any:
    """What is read, or None for an input that is refused as it should be."""
    before, start, result = sorted(folder.rglob("*")), time.process_time(), None
    try:
        result = read()
    except InputError as error:
        said = str(error)
        assert said and said.isprintable() and len(said) < 2100
    assert time.process_time() - start < 1
    assert sorted(folder.rglob("*")) == before
    return result


def check_recordable(made: Settings | None) -> None:
    if made is not None:
        again = parse_json(json.dumps(made.to_dict(), allow_nan=False))
        assert resolve(again) == made


@fuzzed(330)
@given(content=damaged(SETTINGS, as_yaml) | damaged(SETTINGS, as_json))
@example(content=b"cache: {kind: mag, ratios: [1, 1], measured_on: {when: 2026-01-01}}")
def test_configs(content, folder):
    (folder / "config.yaml").write_bytes(content)
    above = {"checkpoint": "x", "prompt": "a cat"}
    check_recordable(taken(lambda: resolve(read_settings(folder / "config.yaml"), above), folder))


@fuzzed(230)
@given(content=damaged(RECORD, as_json))
def test_records(content, folder):
    (folder / "record.json").write_bytes(content)
    check_recordable(taken(lambda: resolve(read_settings(folder / "record.json")), folder))
    assert isinstance(taken(lambda: read_made_with(folder / "record.json"), folder), dict | None)


@fuzzed(230)
@given(content=damaged(LINE, as_line) | damaged(LINE, as_json))
def test_files_of_prompts(content, folder):
    (folder / "prompts.txt").write_bytes(b"a dog\n" + content)
    jobs = taken(lambda: read_prompts(folder / "prompts.txt"), folder)
    for layer, name in jobs or ():
        check_recordable(resolve(layer, {"checkpoint": "x"}))
        assert name is None or (name and "/" not in name)


@fuzzed(60)
@given(content=damaged({"ratios": [1.0, 1.1], "measured_on": {"steps": 2, "lora": ["a:1"]}}, as_json))
def test_ratios(content, folder):
    (folder / "ratios.json").write_bytes(content)
    cache = f"mag:0.1:{folder / 'ratios.json'}"
    check_recordable(taken(lambda: resolve({"checkpoint": "x", "prompt": "a cat", "cache": cache}), folder))


@fuzzed(60)
@given(key=st.sampled_from(("a", "a.b", "", ".", "a..b", "x" * 300)), value=st.sampled_from(SNIPPETS))
def test_settings_of_a_command_line(key, value, folder):
    taken(lambda: with_overrides({"a": {"b": 1}}, [f"{key}={value}"]), folder)


@fuzzed(90)
@given(content=damaged(SMALL, as_yaml) | damaged(SMALL, as_json), own=st.booleans())
def test_what_a_run_settles(content, own, folder, random_nano):
    """In a config, or as the defaults of a checkpoint."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        checkpoint.symlink_to(random_nano)
        own_defaults = folder / "nano"
        own_defaults.mkdir()
        for part in random_nano.iterdir():
            (own_defaults / part.name).symlink_to(part)
    (folder / "config.yaml").write_bytes(b"" if own else content)
    (folder / "nano" / "defaults.yaml").write_bytes(content.replace(b"prompt: a cat\n", b"") if own else b"")
    flags = {"checkpoint": str(folder / "nano"), "prompt": "a cat"}
    request = Request(flags, str(folder / "config.yaml"), None, "none", save_file=folder / "out.png")
    settled = taken(lambda: settle(request, torch.device("cpu")), folder)
    for made, path in settled[1] if settled else ():
        check_recordable(made)
        assert path == folder / "out.png"
