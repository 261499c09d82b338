"""What a pipeline says of prompts that are cut, of numbers that overflow, and of devices that are not there."""

from __future__ import annotations

import logging

import pytest
import torch

import wan
from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError
from wan.models.wan.text import cut_note
from wan.parallel.distributed import pick_device

SHORT = dict(size=(32, 32), frame_num=1, steps=1, seed=1)


@pytest.fixture
def pipe(random_nano):
    return wan.WanT2V.from_pretrained(random_nano)


def test_a_prompt_that_is_cut_is_said_once_with_the_words_that_are_lost(pipe, caplog):
    caplog.set_level(logging.WARNING, "wan")
    long = "a red circle moves " * 60 + "and a blue star turns"
    pipe.generate(long, **SHORT)
    pipe.generate(long, **SHORT, negative_prompt="one two " * 300)
    prompt, negative = (record.getMessage() for record in caplog.records)
    assert prompt.startswith("warning: the text 'a red circle moves a red circle")
    count = len(pipe.tokenizer(long).input_ids) - 1
    assert f"has {count} tokens, of which the text encoder takes 511: cut off are '" in prompt
    assert negative.startswith("warning: the text 'one two one two") and "\n" not in prompt + negative


def test_the_words_that_are_lost_are_those_after_the_last_token_taken(pipe):
    words = [f"w{number}" for number in range(400)]
    tokens = [len(pipe.tokenizer(" ".join(words[: n + 1])).input_ids) for n in range(400)]
    length = tokens[100]
    note = cut_note(pipe.tokenizer, " ".join(words), length)
    assert f"takes {length - 1}: cut off are 'w101 w102 w103" in note
    assert cut_note(pipe.tokenizer, " ".join(words[:101]), length) is None


def test_a_pipeline_notes_the_prompts_that_it_cuts_before_it_encodes_any(pipe, caplog):
    (note,) = pipe.prompt_notes("a red circle", "one two " * 300)
    assert note.startswith("the text 'one two one two") and not caplog.records


def test_values_that_are_not_finite_are_said_with_what_can_make_them_so(pipe):
    text, noise = torch.zeros(1, 5, 64), torch.full((1, 16, 1, 4, 4), torch.nan)
    walk = dict(noise=noise, steps=2, shift=7.0, guide_scale=3.0)
    with pytest.raises(InputError, match="with 2 steps of unipc, shift 7.0, guide_scale 3; go back to") as error:
        pipe.sample(text, text, **walk)
    assert "lora" not in str(error.value).lower()
    begun = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: begun.append(1))
    with pytest.raises(InputError):
        pipe.sample(text, **walk | {"steps": 50, "guide_scale": 1.0})
    assert len(begun) == 1
    pipe.lora = (wan.config.model_settings.LoraFile("style.safetensors", 50.0),)
    with pytest.raises(InputError, match="lower the scales of LoRA files .*style.safetensors:50"):
        pipe.sample(text, text, **walk)


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_weights_of_a_vae_that_are_not_finite_are_found_before_a_video_is_made(value, damaged):
    file = damaged / "Wan2.1_VAE.pth"
    tensors = torch.load(file, weights_only=True)
    tensors["decoder.head.2.bias"][0] = value
    torch.save(tensors, file)
    with pytest.raises(CheckpointError, match="the VAE's 'decoder.conv_out.bias' has values that are not finite"):
        wan.WanT2V.from_pretrained(damaged)


def test_a_vae_that_decodes_to_no_numbers_makes_no_black_video(pipe):
    with pytest.raises(InputError, match="latents to decode have values that are not finite"):
        pipe.decode(torch.full((16, 1, 4, 4), torch.nan))
    pipe.vae.decoder.register_forward_hook(lambda module, args, output: output * torch.nan)
    with pytest.raises(InputError, match="the VAE decodes to values that are not finite; its weights are damaged"):
        pipe.generate("a cat", **SHORT)


@pytest.mark.parametrize("name", ("privateuseone", "hpu", "opencl", "xla", "", "cuda:99999999999", "x" * 5000))
def test_devices_that_this_torch_does_not_have(name):
    with pytest.raises(InputError, match=f"device '{name[:20]}.* cannot be used"):
        pick_device(name)
