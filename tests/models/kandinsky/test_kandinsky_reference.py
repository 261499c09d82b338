"""Kandinsky-5's stages against what the reference programs compute, in float32."""

from __future__ import annotations

import copy

import kandinsky_set
import pytest
import torch
from conftest import relative_error
from kandinsky_set import expected

import wan
from nabla import InputError, NablaConfig
from wan.attention.apply import apply_attention, remove_attention
from wan.models.kandinsky import vae as vaes
from wan.models.kandinsky.guidance import guidance_of
from wan.models.kandinsky.latents import decode, encode_picture
from wan.models.kandinsky.processor import TRANSFORMER
from wan.sampling.loop import Conditions

SPARSE = "nabla-0.9_sta-3-1-1"


@pytest.fixture(scope="module")
def loaded():
    return kandinsky_set.pipeline()


@pytest.fixture
def pipe(loaded):
    yield loaded
    remove_attention(loaded.transformer)


def sample(pipe, guide_scale=5.0, **more):
    given = expected()
    return pipe.sample(
        given["dit.text"],
        given["dit.pooled"],
        given["loop.null_text"],
        given["loop.null_pooled"],
        noise=given["loop.noise"],
        steps=int(given["loop.steps"]),
        shift=given["loop.shift"].item(),
        guide_scale=guide_scale,
        **more,
    )


def largest_error(actual, exact):
    return (actual - exact).abs().max()


@pytest.mark.parametrize("algorithm", ("dense", SPARSE))
def test_a_guided_walk(pipe, algorithm):
    apply_attention([pipe.transformer], NablaConfig.parse(algorithm), TRANSFORMER)
    assert expected()["loop.guide_scale"] == 5
    assert largest_error(sample(pipe), expected()[f"loop.{algorithm}.latents"]) < 1e-4


def test_a_walk_without_guidance(pipe):
    assert largest_error(sample(pipe, guide_scale=1), expected()["loop.no_guidance.latents"]) < 1e-5


def test_one_batch_of_two_equals_two_forwards(pipe, monkeypatch):
    monkeypatch.setattr("wan.models.kandinsky.pipeline.has_room_for_both", lambda *_: True)
    monkeypatch.setattr(pipe, "predict", lambda *given: sizes.append(len(given[0])) or predict(*given))
    predict, sizes = type(pipe).predict.__get__(pipe), []
    test_a_guided_walk(pipe, SPARSE)
    assert set(sizes) == {2}


def test_a_walk_from_a_first_frame_and_its_colours(pipe):
    apply_attention([pipe.transformer], NablaConfig.parse(SPARSE), TRANSFORMER)
    latents = sample(pipe, image_latents=expected()["loop.first_frame"])
    exact = expected()[f"loop.first_frame.{SPARSE}.latents"]
    assert relative_error(latents, exact) < 1e-4
    assert largest_error(latents[:1], expected()["loop.first_frame"]) < 1e-6

    def finish(x):
        first_frame = expected()["loop.first_frame"].movedim(-1, 0)[None]
        conditions = Conditions(guidance_of(pipe, expected()["dit.text"], expected()["dit.pooled"], first_frame))
        return pipe.finish(x.movedim(-1, 0)[None], conditions)[0].movedim(0, -1)

    assert largest_error(finish(exact), expected()["loop.first_frame.normalised"]) < 1e-6
    assert relative_error(finish(latents), expected()["loop.first_frame.normalised"]) < 1e-4
    # Too few frames to have a colour after the first ones stay as they are.
    assert torch.equal(finish(exact[:4])[1:], exact[1:4])


def test_text_states_of_both_encoders(pipe):
    states = pipe.encode_text(expected()["text.ids"], expected()["text.mask"])
    for number, text in enumerate(states):
        assert largest_error(text, expected()[f"text.hidden.{number}"]) < 1e-5
    pooled = pipe.encode_pooled(expected()["clip.ids"], expected()["clip.mask"])
    assert largest_error(pooled, expected()["clip.pooled"]) < 1e-5


@pytest.mark.parametrize("prefix", ("vae", "vae.long"))
def test_the_vae_decodes_short_clips_whole_and_long_ones_by_windows(pipe, prefix):
    assert largest_error(pipe.decode(expected()[f"{prefix}.latents"]), expected()[f"{prefix}.video"]) < 1e-5


def test_the_vae_encodes_a_picture(pipe):
    picture, exact = expected()["vae.picture"], expected()["vae.picture.mean"]
    assert largest_error(encode_picture(pipe.vae, picture), exact) < 1e-5
    one, two = (encode_picture(pipe.vae, picture, 3) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, exact)
    with pytest.raises(InputError, match="a picture of 30\\*16 cannot be encoded whole"):
        encode_picture(pipe.vae, picture[..., :30])


def test_the_first_frame_is_had_without_the_others(pipe):
    latents = expected()["vae.latents"]
    whole = pipe.decode(latents)
    assert largest_error(pipe.glimpse(latents), pipe.decode(latents[:, :, :1])[:, :, 0]) < 1e-6
    assert pipe.glimpse(latents).shape == whole[:, :, 0].shape


@pytest.mark.parametrize("frames", (1, 2, 5, 6, 7, 8, 9))
@torch.no_grad()
def test_windows_cover_all_frames(pipe, frames):
    latents = torch.randn(1, 4, frames, 2, 2, generator=torch.Generator().manual_seed(0))
    video = decode(pipe.vae, latents)
    assert video.shape == (1, 3, 4 * frames - 3, 16, 16)
    # What is before the last fade comes of the first windows alone.
    if frames > 7:
        assert torch.equal(video[:, :, :9], decode(pipe.vae, latents[:, :, :7])[:, :, :9])


def test_one_clip_as_sample_gives_it_is_decoded_alone(pipe):
    latents = expected()["loop.dense.latents"][:, :4, :6]
    video = pipe.decode(latents)
    assert video.shape == (3, 17, 32, 48)
    assert torch.equal(pipe.decode(latents.movedim(-1, 0)[None])[0], video)


@torch.no_grad()
def test_attention_frame_by_frame_is_diffusers_own(pipe):
    config, state = kandinsky_set.component("vae")
    plain = type(pipe.vae).from_config(config).eval()
    plain.load_state_dict(state)
    latents, picture = torch.randn(2, 4, 3, 4, 4), torch.randn(1, 3, 1, 32, 32)
    own = pipe.vae.decoder(pipe.vae.post_quant_conv(latents))
    torch.testing.assert_close(own, plain.decode(latents).sample, atol=1e-5, rtol=0)
    encoded = (vae.encode(picture).latent_dist.mode() for vae in (pipe.vae, plain))
    torch.testing.assert_close(*encoded, atol=1e-5, rtol=0)


@torch.no_grad()
def test_columns_put_the_picture_together(pipe):
    vae, latents = copy.deepcopy(pipe.vae), torch.randn(1, 4, 7, 4, 24)
    vaes.prepare_decoder(vae, torch.float32)
    vaes.split_picture(vae, (192, 32), 2)
    video = torch.cat(list(vaes.decode_windows(vae, latents)), dim=2)
    assert video.shape == (1, 3, 25, 32, 192)
    # The next video is decoded at once again.
    whole = decode(vae, latents * vae.config.scaling_factor)
    assert not vae.use_tiling and not torch.equal(whole, video)


def test_a_float16_decoder_that_overflows_goes_on_in_float32(caplog):
    vae = kandinsky_set.pipeline().vae
    vaes.prepare_decoder(vae, torch.float16)
    assert vaes.decoder_dtype(vae) == torch.float16
    latents = expected()["vae.latents"]
    with torch.no_grad():
        vae.decoder.conv_norm_out.weight.fill_(6e4)
        video = decode(vae, latents)
    assert "overflowed in float16" in caplog.text and video.isfinite().all()
    assert vaes.decoder_dtype(vae) == torch.float32


def test_clip_stays_in_float32_beside_a_half_precision_transformer():
    pipe = wan.from_pretrained(kandinsky_set.CHECKPOINT, dtype=torch.bfloat16)
    assert pipe.text_encoder.dtype == torch.bfloat16 and pipe.text_encoder_2.dtype == torch.float32
    pooled = pipe.encode_pooled(expected()["clip.ids"], expected()["clip.mask"])
    # One rounding, to the transformer's type.
    torch.testing.assert_close(pooled.float(), expected()["clip.pooled"].view_as(pooled), rtol=2**-8, atol=1e-5)
