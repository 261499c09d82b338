"""Kandinsky-5's pipeline from a prompt, or a picture, to frames."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import kandinsky_set
import numpy as np
import pytest
import torch
from conftest import relative_error
from PIL import Image

from nabla import InputError, NablaConfig
from wan.attention.apply import apply_attention, remove_attention
from wan.models.kandinsky.processor import TRANSFORMER
from wan.models.kandinsky.random_text import clip_tokenizer, qwen_tokenizer

SMALL = {"size": (64, 48), "frame_num": 9, "steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def pipe():
    pipe = kandinsky_set.pipeline(tokenizers=(qwen_tokenizer(300), clip_tokenizer(300)))
    apply_attention([pipe.transformer], NablaConfig.parse("nabla-0.5_sta-1-1-1"), TRANSFORMER)
    return pipe


def test_a_prompt_and_a_seed_give_a_video(pipe):
    video = pipe.generate("A red circle", **SMALL)
    assert video.shape == (9, 48, 64, 3) and video.dtype == np.uint8
    assert (pipe.generate("A red circle", **SMALL) == video).all()
    for change in ({"seed": 6}, {"guide_scale": 1}, {"negative_prompt": "blue"}, {"shift": 3.0}):
        assert not (pipe.generate("A red circle", **SMALL | change) == video).all()
    assert not (pipe.generate("A blue circle", **SMALL) == video).all()
    assert set(pipe.seconds) == {"text", "sampling", "decode"}
    assert pipe.describe_attention(pipe.video).startswith("nabla-0.5_sta-1-1-1, backend ")


def test_noise_is_drawn_with_channels_last(pipe):
    noise = pipe.draw_noise(pipe.video, 3)
    drawn = torch.randn(3, 6, 8, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(noise, drawn.movedim(-1, 0)[None])


def test_one_frame_is_described_as_a_picture(pipe, monkeypatch):
    seen = {}
    encode = pipe.encode
    monkeypatch.setattr(pipe, "encode", lambda request: seen.setdefault(request.video.frame_num, encode(request)))
    for frames in (1, 5):
        assert len(pipe.generate("A red circle", **SMALL | {"frame_num": frames, "negative_prompt": "blue"})) == frames
    for frames, still in ((1, True), (5, False)):
        states = pipe.encode_text(*pipe.tokenize(["A red circle", "blue"], still), still)
        for branch, own in zip(seen[frames][:2], states):
            torch.testing.assert_close(branch.text[0, : len(own)], own)
            assert int(branch.rows.sum()) == len(own)
    assert not torch.equal(seen[1].prompt.text, seen[5].prompt.text)


def test_a_video_begins_with_its_picture(pipe, monkeypatch, tmp_path):
    # The published sizes would take minutes here.
    monkeypatch.setattr("wan.models.kandinsky.picture.fit_picture", lambda picture, size: size)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    seen, finish = [], pipe.finish
    monkeypatch.setattr(pipe, "finish", lambda *given: seen.append(given) or finish(*given))
    file = tmp_path / "picture.png"
    Image.fromarray(pixels).save(file)
    videos = [pipe.generate("A red circle", **SMALL, image=one) for one in (pixels, file, Image.fromarray(pixels))]
    assert (videos[0] == videos[1]).all() and (videos[0] == videos[2]).all()
    latents, conditions = seen[0]
    given = conditions.prompt.first_frame
    torch.testing.assert_close(given, pipe.encode_picture(pixels, (64, 48), seed=5))
    torch.testing.assert_close(latents[:, :, :1], given, atol=1e-5, rtol=0)
    assert not (pipe.generate("A red circle", **SMALL) == videos[0]).all()


def test_a_transformer_without_an_input_for_pictures_takes_none(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "transformer", SimpleNamespace(config=SimpleNamespace(visual_cond=False)))
    with pytest.raises(InputError, match="image is not taken"):
        pipe.generate("A cat", image=np.zeros((16, 16, 3), np.uint8), **SMALL)


def test_what_cannot_be_made_is_refused(pipe):
    with pytest.raises(InputError, match="the prompt is empty"):
        pipe.generate(" ", **SMALL)
    with pytest.raises(InputError, match="too many"):
        pipe.generate("A cat", size=(64, 48), frame_num=4 * 128 + 1)
    with pytest.raises(InputError, match="needs negative text states"):
        pipe.sample(torch.zeros(1, 48), torch.zeros(1, 32), noise=torch.zeros(1, 4, 4, 4))


def test_long_prompts_are_cut_with_one_line(pipe, caplog):
    prompt = "A red circle beside a blue square " * 60
    for _ in range(2):
        pipe.tokenize(prompt)
    assert caplog.text.count("cut off are") == 1
    assert len(pipe.prompt_notes(prompt, "A cat")) == 1


def test_bfloat16_keeps_what_decides_in_float32():
    model, mask = kandinsky_set.transformer()
    exact = kandinsky_set.velocity(model)
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    assert model.dtype == torch.bfloat16
    rounded = kandinsky_set.velocity(model)
    assert rounded.dtype == torch.float32 and relative_error(rounded, exact) < 0.03
    apply_attention([model], NablaConfig(threshold=1.0), TRANSFORMER)
    assert relative_error(kandinsky_set.velocity(model), exact) < 0.03
    remove_attention(model)


def test_sampling_settings_of_the_pipeline_are_used_where_none_are_given(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "sampling", replace(pipe.sampling, steps=2, seed=5))
    monkeypatch.setattr(pipe, "video", replace(pipe.video, size=(64, 48), frame_num=9))
    assert (pipe.generate("A red circle") == pipe.generate("A red circle", **SMALL)).all()


def test_after_a_walk_the_transformer_takes_texts_without_padding():
    pipe = kandinsky_set.pipeline()
    given = kandinsky_set.expected()
    pipe.sample(given["dit.text"], given["dit.pooled"], noise=given["loop.noise"], steps=1, guide_scale=1.0)
    assert relative_error(kandinsky_set.velocity(pipe.transformer), given["dit.dense"]) < 1e-5
