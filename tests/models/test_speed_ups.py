"""The faster ways through models give what the plain ones give, and say where they cannot run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.activations import GELU
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

import wan
from nabla import NablaConfig
from wan.attention.compile import compile_blocks
from wan.models.wan.fused_gelu import fuse_gelu, gelu_by_sigmoid, unfuse_gelu
from wan.models.wan.latents import decode, encode
from wan.models.wan.random_checkpoint import random_transformer, random_vae
from wan.models.wan.vae import decoder_dtype, speed_up_decoder, speed_up_encoder, split_picture
from wan.run.flags import SMALL_CHECKPOINT

CPU = torch.device("cpu")


@pytest.fixture
def vae():
    return random_vae("nano", CPU)


def test_the_fast_decoder_is_the_published_one(vae):
    latents = torch.randn(2, 16, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    exact = decode(vae, latents)
    fast = copy.deepcopy(vae)
    speed_up_decoder(fast, torch.float32)
    torch.testing.assert_close(decode(fast, latents), exact, rtol=0, atol=1e-5)
    convolutions = [module for module in fast.decoder.modules() if isinstance(module, WanCausalConv3d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last_3d) for conv in convolutions)


def test_the_decoder_of_what_ships_is_the_published_one_on_a_cpu():
    """Its layers are large enough for oneDNN."""
    pipe = wan.WanT2V.from_pretrained(SMALL_CHECKPOINT, device="cpu")
    latents = torch.randn(1, 16, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    published = AutoencoderKLWan.from_pretrained(SMALL_CHECKPOINT, subfolder="vae", torch_dtype=torch.float32)
    torch.testing.assert_close(pipe.decode(latents), decode(published, latents), rtol=0, atol=1e-5)


def test_the_fast_encoder_is_the_published_one(vae):
    video = torch.rand(2, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact, fast = encode(vae, video), copy.deepcopy(vae)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        speed_up_encoder(fast, dtype)
        latents = encode(fast, video)
        assert latents.dtype == torch.float32
        assert (latents - exact).abs().max() < tolerance * exact.abs().max()


def test_half_precision_is_close_and_the_encoder_stays_exact(vae):
    latents = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    exact, video = decode(vae, latents), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    encoded = encode(vae, video)
    for dtype, decibel in ((torch.float16, 45), (torch.bfloat16, 30)):
        speed_up_decoder(vae, dtype)
        assert decoder_dtype(vae) == dtype
        half = decode(vae, latents)
        assert half.dtype == torch.float32
        assert 10 * math.log10(4 / (half - exact).square().mean().item()) > decibel
    assert torch.equal(encode(vae, video), encoded)


def test_an_overflow_in_float16_is_decoded_again_aloud(vae, caplog):
    latents = torch.randn(1, 16, 2, 4, 4)
    vae.decoder.conv_in.weight.data[0] *= 1e6
    exact = decode(vae, latents)
    speed_up_decoder(vae, torch.float16)
    again = decode(vae, latents)
    assert again.isfinite().all() and "decoding overflowed in float16, so the decoder goes on in float32" in caplog.text
    assert exact.isfinite().all() and decoder_dtype(vae) == torch.float32


def test_the_pipeline_s_decoder_takes_the_type_that_it_is_given(random_nano):
    pipe = wan.WanT2V.from_pretrained(random_nano)
    half = wan.WanT2V.from_pretrained(random_nano, vae_dtype=torch.float16)
    assert decoder_dtype(pipe.vae) == torch.float32 and decoder_dtype(half.vae) == torch.float16
    latents = torch.randn(16, 2, 4, 4)
    assert (pipe.decode(latents) - half.decode(latents)).abs().max() < 2e-2


def test_columns_change_the_picture_little_and_cover_it(vae):
    latents = torch.randn(1, 16, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents).sample
    for tiles in (2, 3):
        split_picture(vae, (256, 128), tiles)
        columns = vae.decode(latents).sample
        assert columns.shape == whole.shape and (columns - whole).abs().mean() < 0.2 * whole.abs().mean()


def test_fused_gelu_leaves_a_cpu_training_and_changed_layers_as_they_were():
    transformer = random_transformer("nano", torch.bfloat16, CPU)
    hidden = torch.randn(1, 5, 128, dtype=torch.bfloat16)
    gelu = transformer.blocks[0].ffn.net[0]
    plain = gelu(hidden)
    fuse_gelu(transformer)
    assert torch.equal(gelu(hidden), plain)
    gelu.proj.register_forward_hook(lambda module, args, out: out + 1)
    assert not torch.equal(gelu(hidden), plain)
    unfuse_gelu(transformer)
    assert type(gelu) is GELU


def test_gelu_by_sigmoid_is_gelu_by_tanh():
    x = torch.linspace(-30, 30, 10_001)
    torch.testing.assert_close(
        gelu_by_sigmoid(x), torch.nn.functional.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6
    )


def test_fused_gelu_compiles_in_one_graph_for_all_blocks():
    torch._dynamo.reset()
    transformer = random_transformer("nano", torch.float32, CPU, layers=3)
    latents, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 512, 64)

    def forward():
        with torch.no_grad():
            return transformer(latents, torch.tensor([500]), text, return_dict=False)[0]

    plain = forward()
    fuse_gelu(transformer)
    compile_blocks(transformer.blocks)
    wan.apply_attention(transformer, NablaConfig(threshold=1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(forward(), plain, rtol=1e-4, atol=1e-4)
