"""Kandinsky-5 on a CUDA GPU: half precision, compiled blocks, float8 and offloading follow float32 in eager code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kandinsky_set import CHECKPOINT, SCALE, expected

import wan
from nabla import NablaConfig
from wan.config.settings import VideoSettings
from wan.models.kandinsky import random_checkpoint
from wan.models.kandinsky.latents import decode
from wan.models.kandinsky.processor import velocity_of
from wan.models.kandinsky.vae import prepare_decoder

pytestmark = pytest.mark.gpu

HALF = NablaConfig(threshold=0.5)
SETTINGS = {"size": (256, 208), "frame_num": 9, "seed": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kandinsky") / "nano"
    random_checkpoint.write("kandinsky5-nano", folder, torch.float32)
    return folder


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return abs(one.astype(float) - other).mean()


@pytest.mark.parametrize("algorithm", ("dense", "nabla-0.9_sta-3-1-1", "nabla-0.6_sta-1-1-3"))
def test_forwards_of_the_set_in_float32(algorithm):
    given = expected()
    pipe = wan.from_pretrained(CHECKPOINT, algorithm, "cuda", torch.float32, compile=False)
    latents = given["dit.latents"].movedim(-1, 0)[None].cuda()
    text, pooled, timestep = (given[f"dit.{name}"].cuda() for name in ("text", "pooled", "timestep"))
    with torch.no_grad():
        out = velocity_of(pipe.transformer, latents, timestep, text[None], pooled, SCALE)[0].movedim(0, -1).cpu()
    right = given[f"dit.{algorithm}"]
    # One product in TF32 would be off by 1e-3.
    assert (out - right).norm() / right.norm() < 1e-4


@pytest.mark.parametrize("offload", (False, True))
def test_half_precision_and_compiled_blocks_follow_float32(checkpoint, offload):
    exact = wan.from_pretrained(checkpoint, HALF, "cuda", torch.float32, compile=False)
    right = exact.generate("a cat", **SETTINGS, steps=4)
    pipe = wan.from_pretrained(checkpoint, HALF, "cuda", torch.bfloat16, offload=offload)
    video = pipe.generate("a cat", **SETTINGS, steps=4)
    assert video.shape == (9, 208, 256, 3) and distance(video, right) < 12
    assert next(pipe.transformer.parameters()).is_cuda is not offload


def test_one_graph_serves_prompts_steps_guidance_and_thresholds(checkpoint):
    pipe = wan.from_pretrained(checkpoint, HALF, "cuda", torch.bfloat16)
    pipe.generate("a cat", **SETTINGS, steps=2)
    # Branches as one batch are a shape of their own; one without guidance is another.
    pipe.generate("a cat", **SETTINGS, steps=1, guide_scale=1.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.generate("a dog that runs a long way through the snow", **SETTINGS, steps=3, shift=3.0)
        wan.apply_attention(pipe.transformer, NablaConfig(threshold=0.3))
        pipe.generate("a dog", **SETTINGS, steps=1, guide_scale=1.0)


def test_float8_layers_follow_bfloat16(checkpoint):
    pytest.importorskip("torchao")
    plain = wan.from_pretrained(checkpoint, HALF, "cuda", torch.bfloat16)
    pipe = wan.from_pretrained(checkpoint, HALF, "cuda", torch.bfloat16, fp8=True)
    assert distance(pipe.generate("a cat", **SETTINGS, steps=2), plain.generate("a cat", **SETTINGS, steps=2)) < 12
    block = pipe.transformer.visual_transformer_blocks[0]
    assert "Float8" in type(block.feed_forward.in_layer.weight).__name__


def test_a_picture_begins_a_video(checkpoint):
    pipe = wan.from_pretrained(checkpoint, HALF, "cuda", torch.bfloat16, compile=False)
    picture = np.random.default_rng(0).integers(0, 255, (208, 256, 3), dtype=np.uint8)
    latents = pipe.encode_picture(picture, (256, 208), seed=1)
    assert latents.shape == (1, 16, 1, 26, 32) and latents.is_cuda and latents.dtype == torch.float32
    noise = pipe.draw_noise(VideoSettings((256, 208), 9), 1)[0].movedim(0, -1)
    text = torch.zeros(5, pipe.transformer.config.in_text_dim), torch.zeros(1, pipe.transformer.config.in_text_dim2)
    out = pipe.sample(*text, noise=noise, steps=2, guide_scale=1.0, image_latents=latents[0].movedim(0, -1))
    assert torch.allclose(out[0], latents[0, :, 0].movedim(0, -1), atol=1e-4)


def test_the_decoder_in_float16_is_that_in_float32_within_45_db():
    vae = random_checkpoint.random_vae("kandinsky5-nano", torch.device("cuda"))
    latents = torch.randn(1, 16, 9, 26, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    prepare_decoder(vae, torch.float32)
    with torch.no_grad():
        exact = decode(vae, latents)
        prepare_decoder(vae, torch.float16)
        error = (decode(vae, latents) - exact).square().mean() / exact.square().mean()
    assert error.item() < 10**-4.5
