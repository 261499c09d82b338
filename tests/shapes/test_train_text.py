"""Training of the small text encoder: its tokenizer, its sentences, its loop, and what our loader makes of it."""

from __future__ import annotations

import itertools
import math
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from places import ROOT
from safetensors.torch import load_file
from shapes_runs import SMALL_TEXT_RUN
from torch import Tensor

from nabla import InputError
from wan.config.config_files import read_settings
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.family import WAN
from wan.models.wan.text import tokenize
from wan.shapes.attributes import ATTRIBUTES
from wan.shapes.dataset import Shapes
from wan.shapes.reader import Reader
from wan.shapes.roughen import misspelt, roughened
from wan.shapes.sentences import CaptionBatch, Sentences, read_sentences, with_classes
from wan.shapes.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from wan.shapes.train_text import TextSettings, TextTrainer
from wan.training.metrics import METRICS_FILE, read_metrics
from wan.training.shutdown import Diverged, Stopped

SENTENCES = ROOT / "tests/data/shapes_sentences.yaml"


def settings(folder: Path, **changes) -> TextSettings:
    return TextSettings.from_dict(SMALL_TEXT_RUN | {"out": str(folder)} | changes)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(folder / METRICS_FILE)]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "text_encoder/model.safetensors")


@pytest.fixture(scope="module")
def tokenizer():
    shapes = Shapes(0, 1500)
    return train_tokenizer((shapes.described(index)[1] for index in range(len(shapes))), 900, 512)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert TextTrainer(settings(folder)).run()
    return folder


@pytest.fixture
def from_step(monkeypatch):
    """Has something done to every loss from a step on, which counts from the beginning of the test."""

    def change(number: int, act) -> None:
        honest, calls = Reader.loss, itertools.count(1)

        def loss(model: Reader, batch: CaptionBatch) -> Tensor:
            value = honest(model, batch)
            return act(value) if next(calls) >= number else value

        monkeypatch.setattr(Reader, "loss", loss)

    return change


def test_known_words_are_whole_and_others_are_spelled(tokenizer):
    assert tokenizer.tokenize("A red circle moves, please!")[:4] == ["▁a", "▁red", "▁circle", "▁moves"]
    assert len(tokenizer) < 1000
    for text in ("upward he went", "zyxwvut qjk 42 @#{|}~", "counter-clockwise"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_odd_texts_are_encoded(tokenizer):
    unknown, end = tokenizer.unk_token_id, tokenizer.eos_token_id
    texts = ["", "🙂", "红色圆形", "Naïve É", "red " * 5000, "x" * 5000]
    ids, mask = tokenize(tokenizer, texts, 64)
    assert ids.shape == mask.shape == (6, 64)
    assert ids[0, :2].tolist() == [end, tokenizer.pad_token_id] == [1, 0] and mask.sum(1)[0] == 1
    assert unknown in ids[1] and unknown in ids[2] and mask.sum(1)[1:3].tolist() == [3, 3]
    assert unknown not in ids[3:] and mask.sum(1)[4:].tolist() == [64, 64] and (ids[4:, -1] == end).all()


def test_a_vocabulary_without_room_for_characters_is_refused():
    with pytest.raises(InputError, match=f"{SMALLEST_VOCABULARY} or more"):
        train_tokenizer(["a"], 50, 512)


def test_rough_sentences_keep_what_they_say():
    shapes, changed = Shapes(1, 200), 0
    said = {"red", "up", "and", "to", "it", "on"}
    for index in range(200):
        text = shapes.described(index)[1]
        rough = roughened(text, np.random.default_rng(index))
        assert rough == roughened(text, np.random.default_rng(index))
        kept = iter(re.findall(r"[a-z]+", rough.lower()))
        # In order, with others between; words so short are never misspelt.
        assert all(word in kept for word in re.findall(r"[a-z]+", text.lower()) if word in said), rough
        changed += rough != text
    assert 100 < changed < 200


def test_slips_keep_the_first_letter_and_short_words():
    slips = {misspelt("yellow", np.random.default_rng(i)) for i in range(60)}
    assert len(slips) > 10 and all(slip[0] == "y" and 5 <= len(slip) <= 7 for slip in slips)
    assert {misspelt(word, np.random.default_rng(0)) for word in ("red", "up", "left-hand", "12345")} == {
        "red",
        "up",
        "left-hand",
        "12345",
    }


def test_batches_depend_on_seed_and_step_alone(tokenizer):
    batch = Sentences(tokenizer, 3, 5)[7]
    again, other = Sentences(tokenizer, 3, 5)[7], Sentences(tokenizer, 4, 5)[7]
    assert all(torch.equal(a, b) for a, b in zip(batch, again))
    assert batch.targets.shape == (5, len(ATTRIBUTES)) and batch.ids.shape == batch.mask.shape
    assert batch.ids.shape != other.ids.shape or not torch.equal(batch.ids, other.ids)


def test_loss_falls_and_the_result_encodes_sentences(tmp_path):
    trainer = TextTrainer(settings(tmp_path, steps=60, batch_size=16, sentences=str(SENTENCES)))
    assert trainer.run()
    values = [loss for _, loss, _ in losses(tmp_path)]
    assert len(values) == 60 and sum(values[-10:]) < 0.6 * sum(values[:10])
    accuracy = read_metrics(tmp_path / METRICS_FILE)[-1]["accuracy"]
    assert set(accuracy) == {"sentences", "held_out"} and set(accuracy["sentences"]) == set(ATTRIBUTES)
    checkpoint = Checkpoint(str(tmp_path), tmp_path, published=False, config={}, family=WAN)
    part = components.text_encoder_component(checkpoint, torch.float32)
    encoder = part.load(torch.float32, "cpu")
    ids, mask = tokenize(components.load_tokenizer(checkpoint, part.model.config.vocab_size), ["a red circle", ""], 32)
    states = encoder(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert states.shape == (mask.sum(), 32) and mask.sum(1)[1] == 1
    torch.testing.assert_close(states.square().mean(-1), torch.ones(len(states)), rtol=1e-3, atol=0)


def test_a_run_cut_by_its_time_goes_on_exactly(whole_run, tmp_path):
    for _ in range(2):
        assert not TextTrainer(settings(tmp_path)).run(minutes=0)
        assert (tmp_path / "text_encoder/config.json").is_file()
    assert len(losses(tmp_path)) == 2
    assert TextTrainer(settings(tmp_path)).run()
    assert losses(tmp_path) == losses(whole_run)
    assert all(torch.equal(value, weights(whole_run)[name]) for name, value in weights(tmp_path).items())
    assert TextTrainer(settings(tmp_path)).run() and losses(tmp_path) == losses(whole_run)


def test_a_loss_that_is_not_a_number_ends_the_run_before_it_is_saved(whole_run, tmp_path, from_step, monkeypatch):
    from_step(8, lambda loss: loss * math.nan)
    with pytest.raises(Diverged, match="step 8: loss nan"):
        TextTrainer(settings(tmp_path)).run()
    assert len(losses(tmp_path)) == 7
    monkeypatch.undo()
    trainer = TextTrainer(settings(tmp_path))
    assert trainer.step == 5 and trainer.run() and losses(tmp_path) == losses(whole_run)


def test_a_signal_ends_the_run_after_a_step_that_is_saved(whole_run, tmp_path, from_step, monkeypatch):
    def terminate(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    from_step(3, terminate)
    with pytest.raises(Stopped, match="step 3"):
        TextTrainer(settings(tmp_path)).run()
    monkeypatch.undo()
    trainer = TextTrainer(settings(tmp_path))
    assert trainer.step == 3 and trainer.run() and losses(tmp_path) == losses(whole_run)


def test_a_folder_of_another_run_is_refused(whole_run):
    with pytest.raises(InputError, match="with lr 0.01, not 0.02"):
        TextTrainer(settings(whole_run, lr=0.02))


@pytest.mark.parametrize(
    "wrong, reason",
    [({"steps": 0}, "steps 0"), ({"dtype": "int8"}, "int8"), ({"encoder": {"depth": 3}}, "depth"), ({"lr": -1}, "lr")],
)
def test_bad_settings_are_refused(tmp_path, wrong, reason):
    with pytest.raises(InputError, match=reason):
        settings(tmp_path, **wrong)


def test_sentences_of_people(tmp_path):
    texts, targets = with_classes(read_sentences(SENTENCES))
    assert len(set(texts)) == len(texts) >= 60 and targets.shape == (len(texts), len(ATTRIBUTES))
    wrong = tmp_path / "wrong.yaml"
    for content in ("- {text: a, shapes: [{kind: cat}]}", "- {shapes: []}", "text", "- {text: a, shapes: [{size: 3}]}"):
        wrong.write_text(content)
        with pytest.raises(InputError, match="wrong.yaml cannot be read"):
            read_sentences(wrong)


def test_the_script(tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train_text.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts/train_text.py"), run_name="__main__")
        return ended.value.code

    config = tmp_path / "text.yaml"
    config.write_text(yaml.safe_dump(SMALL_TEXT_RUN | {"out": str(tmp_path / "run"), "steps": 2}))
    assert run("--config", str(config), "--minutes", "0") == 0 and "start again" in capsys.readouterr().out
    assert run("--config", str(config)) == 0 and "trained" in capsys.readouterr().out
    for wrong in (
        ["--minutes", "-1"],
        ["steps=none"],
        ["out=/dev/null/run"],
        ["sentences=nowhere.yaml"],
        ["unknown=1"],
    ):
        assert run("--config", str(config), *wrong) == 2
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith("error: ") and "Traceback" not in said


def test_the_shipped_config():
    shipped = TextSettings.from_dict(read_settings(ROOT / "configs/training/shapes_text.yaml"))
    assert shipped.vocabulary < 1000 and (ROOT / shipped.sentences).is_file()
