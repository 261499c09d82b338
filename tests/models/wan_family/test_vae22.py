"""Wan2.2's VAE: the published numbers from either layout, by diffusers' layers and faster ones, whole and in tiles."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch
from conftest import DATA, relative_error
from counted import Counted
from safetensors.torch import load_file, save_file

from nabla import InputError
from wan.checkpoints.component_files import DIFFUSERS_STEM
from wan.checkpoints.file_errors import CheckpointError
from wan.checkpoints.saving import save_pickle
from wan.checkpoints.weights import WeightFiles
from wan.memory.estimates import decode_bytes
from wan.models.checkpoint import Checkpoint
from wan.models.wan import vae as fast_layers
from wan.models.wan.family import WAN
from wan.models.wan.latent_statistics import STATISTICS, WAN22, fold_statistics
from wan.models.wan.latents import decode, encode, glimpse
from wan.models.wan.vae import decoding_of, encoding_of, geometry_by, speed_up_decoder, speed_up_encoder
from wan.models.wan.vae_component import read_vae, vae_component, vae_of_tensors
from wan.models.wan.vae_names import published_name
from wan.models.wan.whole_clips import posterior, reconstruction, take_whole_clips

SET = DATA / "ti2v_5b-nano"
FILE = SET / "checkpoint" / "Wan2.2_VAE.pth"
SINGLE = f"{DIFFUSERS_STEM}.safetensors"


@pytest.fixture(scope="module")
def exact() -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(SET / "expected.safetensors").items() if name.startswith("vae.")}


@pytest.fixture(scope="module")
def vae():
    return read_vae(WeightFiles([FILE]), None).load(torch.float32, "cpu")


@pytest.fixture
def fast(vae):
    made = copy.deepcopy(vae)
    speed_up_decoder(made, torch.float32)
    speed_up_encoder(made, torch.float32)
    return made


@pytest.fixture
def saved(vae, tmp_path):
    """The folder of the VAE in diffusers' layout, with a key that files on the hub have, and what its JSON says."""
    vae.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clip_output": False}))
    return tmp_path / "vae"


def read(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    return read_vae(WeightFiles.find(folder, DIFFUSERS_STEM), config)


def known_shapes(key: str) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a published file."""
    keys = json.loads((DATA / "wan_family_keys.json").read_text())[key]["keys"]
    return {name: tuple(shape) for name, shape in keys.items()}


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("key", ("vae 2.1", "vae 2.2"))
def test_published_names_and_sizes_are_understood(key):
    shapes = known_shapes(key)
    model = vae_of_tensors(shapes)
    rename = published_name(model)
    assert {rename(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert sum(map(math.prod, shapes.values())) == {"vae 2.1": 126_892_531, "vae 2.2": 704_688_668}[key]
    assert geometry_by(model).vae_stride == ((4, 16, 16) if key == "vae 2.2" else (4, 8, 8))


def test_it_computes_what_the_published_program_does(vae, fast, exact):
    whole = copy.deepcopy(vae)
    take_whole_clips(whole)
    with torch.no_grad():
        for model in (vae, fast):
            assert relative_error(encode(model, exact["vae.input"][None])[0], exact["vae.encoded"]) < 1e-5
            assert relative_error(decode(model, exact["vae.latents"][None])[0], exact["vae.video"]) < 1e-5
        assert relative_error(encode(whole, exact["vae.input"][None], posterior)[0], exact["vae.encoded"]) < 1e-5
        first = glimpse(fast, exact["vae.latents"][None])[0]
        assert relative_error(first, exact["vae.video"][:, 0]) < 1e-5


@pytest.mark.parametrize("onednn_least", (0, float("inf")))
@pytest.mark.parametrize("frames", (1, 5, 13))
def test_faster_layers_and_whole_clips_give_what_diffusers_gives_by_chunks(
    vae, fast, frames, onednn_least, monkeypatch
):
    monkeypatch.setattr(fast_layers, "ONEDNN_LEAST", onednn_least)
    whole, video = copy.deepcopy(vae), draw(2, 3, frames, 32, 64)
    take_whole_clips(whole)
    with torch.no_grad():
        distribution = vae.encode(video).latent_dist
        latents = distribution.mode()
        assert latents.shape == (2, 48, (frames + 3) // 4, 2, 4)
        decoded = vae.decode(latents).sample
        assert relative_error(fast.encode(video).latent_dist.mode(), latents) < 1e-5
        assert relative_error(fast.decode(latents).sample, decoded) < 1e-5
        assert relative_error(posterior(whole, video).parameters, distribution.parameters) < 1e-5
        assert relative_error(reconstruction(whole, latents).clamp(-1, 1), decoded) < 1e-5


@pytest.mark.parametrize("frames", (81, 121))
def test_a_published_count_of_frames_is_encoded_whole(fast, frames):
    with torch.no_grad():
        latents = encode(fast, draw(1, 3, frames, 32, 32))
        assert latents.shape == (1, 48, (frames + 3) // 4, 2, 2)
        assert decode(fast, latents).shape == (1, 3, frames, 32, 32)


def test_half_precision_is_close(vae, exact):
    half = copy.deepcopy(vae)
    speed_up_decoder(half, torch.float16)
    with torch.no_grad():
        assert relative_error(decode(half, exact["vae.latents"][None])[0], exact["vae.video"]) < 1e-2


@pytest.mark.parametrize("size", ((40, 32), (32, 24)))
def test_what_would_be_cropped_is_refused(vae, size):
    with pytest.raises(InputError, match=r"sizes multiples of 16"):
        encode(vae, draw(1, 3, 1, size[1], size[0]))


@pytest.mark.parametrize("tiles", (2, 3))
def test_tiles_cover_the_picture_and_change_it_little(fast, tiles, monkeypatch):
    video, asked = draw(1, 3, 5, 64, 512), []
    with torch.no_grad():
        latents = encode(fast, video)
        decoded = decode(fast, latents)
        monkeypatch.setattr(fast_layers, "tiles_for", lambda decoding, *_: asked.append(decoding.size) or tiles)
        for tiled, whole in ((encode(fast, video), latents), (decode(fast, latents), decoded)):
            assert tiled.shape == whole.shape and 0 < (tiled - whole).abs().mean() < 0.2 * whole.abs().mean()
        assert asked == [(512, 64)] * 2
        # What was decoded in tiles is no reason to encode in them.
        monkeypatch.setattr(fast_layers, "tiles_for", lambda *_: 1)
        assert torch.equal(encode(fast, video), latents)


def test_diffusers_layout_gives_the_same(vae, saved):
    component = read(saved)
    assert dict(component.tensors()).keys() == vae.state_dict().keys()
    own = component.load(torch.float32, "cpu")
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in own.state_dict().items())
    assert all(list(own.config[name]) == list(vae.config[name]) for name in STATISTICS)


def test_other_statistics_are_folded_for_the_published_file(vae, saved, tmp_path):
    """As a conversion does."""
    own = {"latents_mean": draw(48).tolist(), "latents_std": (draw(48) + 2).tolist()}
    component = read(saved, **own)
    tensors = dict(component.tensors())
    folded = tensors | fold_statistics(tensors, own, WAN22)
    rename = published_name(component.model)
    save_pickle({rename(name): tensor for name, tensor in folded.items()}, tmp_path / "folded.pth")
    there = read_vae(WeightFiles([tmp_path / "folded.pth"]), None).load(torch.float32, "cpu")
    here, video = component.load(torch.float32, "cpu"), draw(1, 3, 5, 32, 32)
    with torch.no_grad():
        latents = encode(here, video)
        assert relative_error(encode(there, video), latents) < 1e-5
        assert relative_error(decode(there, latents), decode(here, latents)) < 1e-5


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"scale_factor_spatial": 8}, r"are \(4, 8\), but its stages make \(4, 16\)"),
        ({"scale_factor_temporal": 8}, r"are \(8, 16\), but its stages make \(4, 16\)"),
        ({"patch_size": 4}, r"but its stages make \(4, 32\)"),
        ({"patch_size": "2"}, "patch_size is '2', but must be a positive integer"),
        ({"patch_size": None, "scale_factor_spatial": 8}, "in_channels is 12, but 3 colours in patches of 1 are 3"),
        ({"is_residual": "yes"}, "is_residual is 'yes'"),
        ({"is_residual": False}, "its files 0"),
        ({"num_res_blocks": 3}, "num_res_blocks is 3, but its files hold 2 layers"),
        ({"dim_mult": [1, 2, 4]}, "2 booleans"),
        ({"base_dim": 8}, "must be"),
        ({"latents_std": [1.0] * 16}, "must be 48 numbers"),
        ({"latents_std": [0.0] * 48}, "must be above 0"),
        ({"unheard_of": 1}, "does not fit AutoencoderKLWan"),
    ),
)
def test_a_configuration_that_is_not_of_its_tensors_is_refused(saved, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(saved, **changes)


@pytest.mark.parametrize(
    "name, message",
    (
        ("encoder.downsamples.0.downsamples.1.residual.6.bias", "is missing"),
        ("encoder.downsamples.1.downsamples.2.time_conv.weight", "make"),
        ("decoder.upsamples.0.upsamples.3.time_conv.bias", "is missing"),
        ("conv2.weight", "KeyError"),
    ),
)
def test_a_file_that_lacks_a_tensor_is_refused(tmp_path, name, message):
    tensors = dict(WeightFiles([FILE]))
    del tensors[name]
    save_pickle(tensors, tmp_path / "lacks.pth")
    with pytest.raises(CheckpointError, match=message):
        read_vae(WeightFiles([tmp_path / "lacks.pth"]), None)


def test_a_tensor_more_is_refused(saved):
    tensors = load_file(saved / SINGLE)
    save_file(tensors | {"more": torch.ones(1)}, saved / SINGLE)
    with pytest.raises(CheckpointError, match="tensor 'more' does not belong to this model"):
        read(saved)


@pytest.mark.parametrize("key", ("vae 2.1", "vae 2.2"))
@torch.no_grad()
def test_memory_at_published_sizes_is_within_its_estimate(key):
    model = vae_of_tensors(known_shapes(key)).requires_grad_(False)
    speed_up_decoder(model, torch.float32)
    speed_up_encoder(model, torch.float32)
    size, stride = (1280, 704), model.config.scale_factor_spatial
    places = size[1] // stride, size[0] // stride
    # The share of a first frame is that of Wan2.1's; of encoding the estimate is of gaps between tensors too.
    for frames, most in ((1, 1.8), (17, 1.5)):
        with Counted() as encoding:
            model.encode(torch.empty(1, 3, frames, size[1], size[0], device="meta"))
        estimate = decode_bytes(encoding_of(size, frames, torch.float32, model.config))
        assert encoding.peak <= estimate < most * encoding.peak
    with Counted() as decoding:
        model.decode(torch.empty(1, model.config.z_dim, 5, *places, device="meta"))
    assert decoding.peak <= decode_bytes(decoding_of(size, 17, torch.float32, model.config)) < 1.3 * decoding.peak


@pytest.mark.parametrize(
    "kind, config, message",
    (
        ("t2v", {}, r"takes 4 frames and 16 pixels to one latent, but this checkpoint's transformer 4 and 8"),
        ("ti2v-5B", {"out_dim": 16}, "z_dim is 48, but this checkpoint's transformer makes latents of 16 channels"),
    ),
)
def test_the_vae_of_another_transformer_is_refused(tmp_path, kind, config, message):
    for name in ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth"):
        shutil.copy(FILE, tmp_path / name)
    checkpoint = Checkpoint(str(tmp_path), tmp_path, True, config, WAN, kind=kind)
    with pytest.raises(CheckpointError, match=message):
        vae_component(checkpoint)


def test_estimates_of_memory_follow_size_width_and_type():
    size, config = (1280, 704), {"is_residual": True, "base_dim": 160, "decoder_base_dim": 256}
    assert decoding_of(size, 121, torch.float32, config).pixel_bytes == 20_000
    assert decoding_of(size, 121, torch.float16, config | {"decoder_base_dim": 128}).pixel_bytes == 5_000
    assert decoding_of(size, 81, torch.float16).pixel_bytes == 10_500
    clip, picture = (encoding_of(size, frames, torch.float32, config) for frames in (121, 1))
    # A picture takes less than a clip, and columns less than the whole.
    assert decode_bytes(picture) < decode_bytes(clip) / 3 and decode_bytes(clip, 4) < decode_bytes(clip)
