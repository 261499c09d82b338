"""Lines of a file of prompts, lists of sentences and words of a command line are read as strictly as settings are."""

from __future__ import annotations

import pytest

from nabla import InputError
from wan.run.jobs import read_prompts
from wan.shapes.sentences import read_sentences
from wan.training.prepare_settings import PrepareSettings
from wan.training.schema import with_overrides


@pytest.mark.parametrize(
    "line, message",
    (
        ('{"prompt": "a dog", "seed": 1, "prompt": "a cat"}', "the key 'prompt' stands twice in one object; keep one"),
        ('{"prompt":' * 100_000, "it is nested more than 100 deep"),
        ('{"prompt": "a cat", "seed": NaN}', "NaN is not a finite number"),
        ('{"prompt": "a cat", "seed": ' + "9" * 5000 + "}", "a number of 5000 digits; the most is 64"),
        ('{"prompt": ["a cat"]}', r"prompt \['a cat'\] is not a text"),
        ('{"prompt": "a cat", "size": {"a": 1}}', "is not of the form width"),
        ("a cat " * 10_000, "prompt has 59999 characters; shorten it"),
    ),
)
def test_lines_that_are_damaged_or_made_to_harm(line, message, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n" + line)
    with pytest.raises(InputError, match=f"prompts.txt, line 2: .*{message}") as error:
        read_prompts(tmp_path / "prompts.txt")
    assert str(error.value).isprintable() and len(str(error.value)) < 2100


@pytest.mark.parametrize(
    "words, message",
    (
        ("optimizer={lr: 1, lr: 2}", "the key 'lr' stands twice"),
        ("steps=" + "[" * 3000, "nested more than 100 deep"),
        ("steps=0x" + "f" * 5000, "a number of 5002 digits"),
        ("steps=&a [*a]", "it contains itself"),
        ("steps=!!int ''", "a value is not of its type"),
        ("steps=.inf", "'.inf' is not a finite number"),
    ),
)
def test_words_of_a_command_line(words, message):
    with pytest.raises(InputError, match=f"its value cannot be read .*{message}"):
        with_overrides({"steps": 3}, [words])


def test_dates_of_a_command_line_are_texts():
    assert with_overrides({}, ["out=2026-01-01"]) == {"out": "2026-01-01"}


def test_folders_of_training_with_names_too_long():
    with pytest.raises(InputError, match="out 'nnn.*' is too long: a name of 300 bytes"):
        PrepareSettings("checkpoint", "n" * 300)


def test_a_sentence_that_says_something_twice(tmp_path):
    path = tmp_path / "sentences.yaml"
    path.write_text("- text: a red circle\n  text: a blue circle\n  shapes: []\n")
    with pytest.raises(InputError, match="sentences.yaml cannot be read .*the key 'text' stands twice"):
        read_sentences(path)
