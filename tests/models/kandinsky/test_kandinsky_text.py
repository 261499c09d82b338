"""Prompts as both text encoders of Kandinsky-5 see them."""

from __future__ import annotations

import pytest
import torch

from nabla import InputError
from wan import CheckpointError
from wan.models.kandinsky import text
from wan.models.kandinsky.random_text import clip_tokenizer, qwen_tokenizer
from wan.sampling.texts import pad_rows


@pytest.fixture(scope="module")
def qwen():
    return qwen_tokenizer(2000, [text.BEFORE])


def own_tokens(tokenizer, prompt, length=256):
    ids, mask = text.tokenize(tokenizer, [prompt], length)
    return tokenizer.decode(ids[0, text.tokens_before(tokenizer) : mask.sum()])


def test_a_prompt_stands_in_the_template_and_its_tokens_follow_the_crop(qwen):
    ids, mask = text.tokenize(qwen, ["A red circle", "A long way {} home"], 256)
    whole = [qwen.decode(row[: int(own.sum())]) for row, own in zip(ids, mask)]
    assert whole == [text.BEFORE + prompt + "<|im_end|>" for prompt in ("A red circle", "A long way {} home")]
    assert text.BEFORE.count("promt") == text.BEFORE.count("scren") == 1
    assert own_tokens(qwen, "A red circle") == "A red circle<|im_end|>"


def test_a_single_picture_has_a_template_of_its_own(qwen):
    ids, mask = text.tokenize(qwen, ["A red circle", "A cat"], 256, still=True)
    crop = text.tokens_before(qwen, still=True)
    assert qwen.decode(ids[0, : mask[0].sum()]) == text.BEFORE_STILL + "A red circle<|im_end|>"
    assert qwen.decode(ids[0, crop : mask[0].sum()]) == "A red circle<|im_end|>"
    assert text.BEFORE_STILL.count("promt") == 1 and text.tokens_before(None, still=True) == 41
    long = text.tokenize(qwen, ["A red circle " * 100], 12, still=True)[0]
    assert long.shape == (1, crop + 12)


def test_leading_newlines_do_not_touch_the_template(qwen):
    for prompt in ("\n\nA red circle", "\r\nA red circle", "  \n A red circle"):
        assert own_tokens(qwen, prompt).strip() == "A red circle<|im_end|>"
    assert own_tokens(qwen, " A red circle\n") == " A red circle\n<|im_end|>"


def test_a_long_prompt_is_cut_with_a_line_of_what_is_cut(qwen):
    prompt = "A red circle " * 100
    assert own_tokens(qwen, prompt, 12).startswith("A red circle")
    ids, mask = text.tokenize(qwen, [prompt, "A cat"], 12)
    assert ids.shape == mask.shape == (2, text.tokens_before(qwen) + 12) and mask[0].all()
    note = text.cut_note(qwen, prompt, 12)
    assert "tokens, of which the text encoder takes 12: cut off are " in note and "circle" in note
    assert text.cut_note(qwen, "A red circle", 12) is None


def test_clip_takes_the_beginning_of_a_bare_prompt():
    tokenizer = clip_tokenizer(900)
    ids, mask = text.tokenize_pooled(tokenizer, ["A red circle", "a cat " * 100], 77)
    assert ids.shape == mask.shape == (2, 77)
    assert tokenizer.decode(ids[0][mask[0].bool()], skip_special_tokens=True).strip() == "a red circle"
    assert mask[1].all() and ids[1, -1] == tokenizer.eos_token_id


def test_without_a_tokenizer_prompts_cannot_be_read():
    with pytest.raises(CheckpointError, match="lacks a tokenizer"):
        text.tokenize(None, ["a"], 8)
    assert text.tokens_before(None) == 129


def test_states_are_padded_to_the_rows_that_the_transformer_sees():
    states = torch.ones(3, 4)
    assert torch.equal(pad_rows(states, 5), torch.cat((states, torch.zeros(2, 4))))
    with pytest.raises(InputError, match="3 rows are too long; the transformer takes up to 2"):
        pad_rows(states, 2)
