"""What settings and records say of prompts that are written out."""

from __future__ import annotations

import json

import pytest

import generate
import wan
from nabla import InputError
from wan.config.settings import resolve, writers_of
from wan.run.jobs import name_of, read_prompts
from wan.run.sidecars import Sidecar, comparable
from wan.serve.page.sidecars import from_sidecar

PLAIN = {"checkpoint": "x", "prompt": "a cat"}
ASKED = PLAIN | {"expand_prompt": True}
WRITTEN = ASKED | {"expanded_prompt": "A cat, at length."}


def test_settings_come_back_from_their_record():
    for layer in (PLAIN, ASKED, WRITTEN):
        settings = resolve(layer)
        assert resolve(settings.to_dict()) == settings
    assert not {"expand_prompt", "expanded_prompt"} & resolve(PLAIN).to_dict().keys()
    assert [resolve(one).text for one in (PLAIN, ASKED, WRITTEN)] == ["a cat", "a cat", "A cat, at length."]
    several = [resolve(one) for one in (PLAIN, WRITTEN, PLAIN | {"image": "first.png"})]
    assert writers_of(several) == (False, False)
    assert writers_of([*several, resolve(ASKED)]) == (True, False)
    assert writers_of([*several, resolve(ASKED | {"image": "first.png"})]) == (True, True)


@pytest.mark.parametrize("above", ({"prompt": "a dog"}, {"image": "x.png"}, {"expand_prompt": True}))
def test_a_text_is_left_out_beside_what_it_was_not_made_of(above):
    assert resolve(above, WRITTEN).expanded_prompt is None
    assert resolve({"sampling": {"seed": 3}}, WRITTEN).expanded_prompt == "A cat, at length."


@pytest.mark.parametrize(
    "layer, message",
    (
        (PLAIN | {"expand_prompt": "yes"}, "expand_prompt 'yes' is neither true nor false"),
        (PLAIN | {"expanded_prompt": "A cat."}, "expanded_prompt is used where expand_prompt is true"),
        (ASKED | {"expanded_prompt": " "}, "expanded_prompt is empty"),
        (ASKED | {"expanded_prompt": 3}, "expanded_prompt 3 is not a text"),
    ),
)
def test_what_does_not_go_together(layer, message):
    with pytest.raises(InputError, match=message):
        resolve(layer)


def test_a_record_is_of_what_was_asked_for(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"settings": resolve(WRITTEN).to_dict()}))
    record = Sidecar.read(tmp_path / "a.json")
    other = WRITTEN | {"expanded_prompt": "Another cat."}
    found = [record.is_of(comparable(resolve(layer))) for layer in (PLAIN, ASKED, WRITTEN, other)]
    assert found == [False, True, True, False]
    plain, *expanded = (name_of(resolve(layer)) for layer in (PLAIN, ASKED, WRITTEN))
    assert len(set(expanded)) == 1 and plain not in expanded


def test_a_line_of_a_file_of_prompts_says_whether(tmp_path):
    path = tmp_path / "prompts"
    path.write_text('{"prompt": "a cat", "expand_prompt": true}\n{"prompt": "a dog"}')
    assert [layer.get("expand_prompt") for layer, _ in read_prompts(path)] == [True, None]
    path.write_text('{"prompt": "a cat", "expand_prompt": 3}')
    with pytest.raises(InputError, match="line 1: expand_prompt 3 is neither"):
        read_prompts(path)


def test_the_page_takes_the_text_of_a_record_for_its_prompt():
    own = resolve(PLAIN | {"checkpoint": "here", "expand_prompt": True})
    settings, notes = from_sidecar(WRITTEN | {"checkpoint": "here"}, own, {}, {"here"}, {})
    assert settings.prompt == "A cat, at length." and not settings.expand_prompt
    assert notes == ["the prompt is the text that it was expanded to"]
    assert not from_sidecar(PLAIN | {"checkpoint": "here"}, own, {}, {"here"}, {})[0].expand_prompt


def test_wan_refuses(random_nano, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt_dir", str(random_nano), "--device", "cpu", "--prompt", "a cat", "--expand_prompt"]
    assert generate.main(flags) == 2
    assert "expand_prompt is not supported for Wan; leave it out" in capsys.readouterr().err
    with pytest.raises(InputError, match="expand_prompt is not supported"):
        wan.from_pretrained(random_nano, expand_prompt=True)
