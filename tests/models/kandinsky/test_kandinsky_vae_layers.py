"""The VAE's layers of fewer passes against diffusers' own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from torch import nn

from wan.models.kandinsky import vae_layers
from wan.models.kandinsky.random_checkpoint import random_vae
from wan.models.kandinsky.vae import prepare_decoder


@pytest.fixture(scope="module")
def vaes():
    """Diffusers' VAE, and the same with our layers."""
    plain = random_vae("kandinsky5-nano", torch.device("cpu"))
    fast = copy.deepcopy(plain)
    prepare_decoder(fast, torch.float32)
    return plain, fast


def slow_stats(x, eps):
    """What a GPU's kernel gives for x, (places, C): means, and one by the deviations, in float32."""
    assert x.is_contiguous()
    variance, mean = torch.var_mean(x.double(), 0, correction=0)
    return mean.float(), (variance + eps).rsqrt().float()


@pytest.mark.parametrize("frames", (1, 2, 3))
@pytest.mark.parametrize("onednn_least", (0, float("inf")))
def test_the_decoder_and_the_encoder_are_diffusers(vaes, frames, onednn_least, monkeypatch):
    monkeypatch.setattr(vae_layers, "ONEDNN_LEAST", onednn_least)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, frames, 2, 3, generator=generator)
    video = torch.rand(2, 3, 4 * frames - 3, 16, 24, generator=generator) * 2 - 1
    with torch.no_grad():
        for part, given in (("decoder", latents), ("encoder", video)):
            before = given.clone()
            exact, ours = (getattr(vae, part)(given) for vae in vaes)
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5 * exact.abs().max().item())
            assert torch.equal(given, before)


def test_convolutions_are_given_all_channels_last(vaes):
    _, fast = vaes
    convolutions = [module.conv for module in fast.modules() if isinstance(module, HunyuanVideoCausalConv3d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last_3d) for conv in convolutions)
    seen = []
    # Those of one place take what the last has made, which on a CPU may lie otherwise.
    padded = [conv for conv in convolutions if conv.kernel_size != (1, 1, 1)]
    hooks = [conv.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for conv in padded]
    with torch.no_grad():
        fast.decoder(torch.randn(1, 16, 2, 2, 2))
    for hook in hooks:
        hook.remove()
    assert seen and all(x.is_contiguous(memory_format=torch.channels_last_3d) for x in seen)


@pytest.mark.parametrize("most_numbers", (vae_layers.MOST_NUMBERS, 1))
def test_scale_and_shift_of_a_gpu_are_group_norm_s(monkeypatch, most_numbers):
    monkeypatch.setattr(torch, "batch_norm_stats", slow_stats)
    monkeypatch.setattr(vae_layers, "MOST_NUMBERS", most_numbers)
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    norm.weight.data, norm.bias.data = torch.randn(2, 16, generator=generator)
    x = torch.randn(2, 16, 3, 4, 5, generator=generator)
    # Channels and frames that lie apart, and one that does not vary.
    x = x + 3 * torch.randn(2, 16, 3, 1, 1, generator=generator)
    x[:, 3] = 2.0
    x = x.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        exact = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
        scale, shift = vae_layers.scale_and_shift(norm, x)
        torch.testing.assert_close(torch.addcmul(shift, x, scale).double(), exact, rtol=0, atol=1e-5)
        # From half precision they are float32 too, and what they give is rounded once.
        half = x.half()
        scale, shift = vae_layers.scale_and_shift(norm.half(), half)
        assert scale.dtype == shift.dtype == torch.float32
        out = torch.addcmul(shift, half, scale, out=torch.empty_like(half))
        torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=1e-2)
