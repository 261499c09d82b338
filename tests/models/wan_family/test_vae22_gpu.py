"""Wan's VAEs on a CUDA GPU: memory within its estimates, and faster layers and tiles that give what diffusers gives."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import DATA, relative_error
from torch import Tensor

from wan.memory.budget import limit
from wan.memory.estimates import Decoding, decode_bytes
from wan.memory.planner import GB, MemoryBudget
from wan.models.wan.latents import decode, encode
from wan.models.wan.vae import decoding_of, encoding_of, speed_up_decoder, speed_up_encoder
from wan.models.wan.vae_component import vae_of_tensors

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
SIZE, FRAMES = (1280, 704), 33


@pytest.fixture(params=("vae 2.1", "vae 2.2"))
def vae(request):
    """Of the published sizes, with random weights."""
    keys = json.loads((DATA / "wan_family_keys.json").read_text())[request.param]["keys"]
    model = vae_of_tensors({name: tuple(shape) for name, shape in keys.items()}).to_empty(device=GPU)
    generator = torch.Generator(GPU).manual_seed(0)
    for name, weight in model.requires_grad_(False).named_parameters():
        if name.endswith("gamma"):
            weight.fill_(1)
        else:
            # The root of 1 / fan-in keeps the std of normalised inputs.
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.01
            weight.normal_(std=scale, generator=generator)
    yield model.eval()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def draw(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).to(GPU) * 2 - 1


def latents_for(vae, frames: int, size: tuple[int, int]) -> Tensor:
    stride = vae.config.scale_factor_spatial
    return draw(1, vae.config.z_dim, (frames + 3) // 4, size[1] // stride, size[0] // stride)


def check_peak(peak: int, decoding: Decoding) -> None:
    estimate = decode_bytes(decoding)
    # What is put right after a measurement is the bytes of a pixel.
    pixels = decoding.size[0] * decoding.size[1]
    beside = estimate - pixels * decoding.pixel_bytes
    assert peak <= estimate < 1.3 * peak, f"{(peak - beside) / pixels:.0f} of {decoding.pixel_bytes:.0f} bytes a pixel"


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@torch.no_grad()
def test_decoding_takes_what_is_estimated(vae, dtype):
    speed_up_decoder(vae, dtype)
    latents = latents_for(vae, FRAMES, SIZE).to(dtype)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert vae.decode(latents).sample.shape == (1, 3, FRAMES, SIZE[1], SIZE[0])
    check_peak(torch.cuda.max_memory_allocated() - before, decoding_of(SIZE, FRAMES, dtype, vae.config))


@torch.no_grad()
def test_encoding_takes_what_is_estimated(vae):
    speed_up_encoder(vae, torch.float32)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    latents = vae.encode(draw(1, 3, FRAMES, SIZE[1], SIZE[0])).latent_dist.mode()
    assert latents.shape[2] == (FRAMES + 3) // 4
    check_peak(torch.cuda.max_memory_reserved() - before, encoding_of(SIZE, FRAMES, torch.float32, vae.config))


@torch.no_grad()
def test_faster_layers_give_what_diffusers_gives(vae, monkeypatch):
    # Which rounds two layouts of the same numbers to different results.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    video, latents = draw(1, 3, 9, 128, 192), latents_for(vae, 9, (192, 128))
    fast = copy.deepcopy(vae)
    speed_up_decoder(fast, torch.float32)
    speed_up_encoder(fast, torch.float32)
    assert relative_error(encode(fast, video), encode(vae, video)) < 1e-4
    assert relative_error(decode(fast, latents), decode(vae, latents)) < 1e-4


@torch.no_grad()
def test_a_clip_that_does_not_fit_is_encoded_in_columns(vae, caplog):
    speed_up_encoder(vae, torch.float32)
    video = draw(1, 3, 9, 480, 832)
    whole = encode(vae, video)
    torch.cuda.empty_cache()
    there = torch.cuda.memory_allocated()
    needed = decode_bytes(encoding_of((832, 480), 9, torch.float32, vae.config))
    # Beside what is there already.
    limit(GPU, MemoryBudget(int(0.7 * needed), 0, 0))
    torch.cuda.reset_peak_memory_stats()
    with caplog.at_level("INFO"):
        columns = encode(vae, video)
    assert "encoding in" in caplog.text and columns.shape == whole.shape
    assert torch.cuda.max_memory_allocated() < there + 0.7 * needed + 0.1 * GB
    assert relative_error(columns, whole) < 0.5
