"""Conversion between the layouts: the same numbers from both, nothing lost in silence, whole or not at all."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

import generate
from nabla import InputError
from scripts import convert_checkpoint
from wan.checkpoints.weights import WeightFiles
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components, latents, published
from wan.models.wan.convert import convert
from wan.models.wan.latent_statistics import fold_statistics
from wan.models.wan.layout import TEXT_ENCODER_FILE, VAE_FILE
from wan.models.wan.pipeline import WanT2V
from wan.models.wan.vae_component import vae_of_tensors

SINGLE = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
DEFAULTS = "sampling: {steps: 3, shift: 2.0}\nattention: {algorithm: nabla-0.6, dense_layers: [1]}\n"


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def converted(folder: Path, out: Path, layout: str) -> Path:
    assert convert(Checkpoint.open(folder), out, layout) == []
    return out


@pytest.fixture(scope="module")
def own(random_nano, tmp_path_factory) -> Path:
    """A checkpoint in diffusers' layout whose latents have a mean and deviation of their own, and with defaults."""
    folder = converted(random_nano, tmp_path_factory.mktemp("own") / "checkpoint", "diffusers")
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.randn(16, generator=generator), torch.rand(16, generator=generator) * 3 + 0.2
    edit_json(folder / "vae" / "config.json", latents_mean=mean.tolist(), latents_std=deviation.tolist())
    edit_json(folder / "transformer" / "config.json", sparse_algo="nabla-0.6", text_len=64)
    (folder / "defaults.yaml").write_text(DEFAULTS)
    edit_json(folder / SCHEDULER, flow_shift=2.0)
    return folder


@pytest.fixture(scope="module")
def as_published(own, tmp_path_factory) -> Path:
    return converted(own, tmp_path_factory.mktemp("published") / "checkpoint", "published")


@pytest.fixture(scope="module")
def and_back(as_published, tmp_path_factory) -> Path:
    return converted(as_published, tmp_path_factory.mktemp("back") / "checkpoint", "diffusers")


@pytest.fixture
def copy(own, tmp_path) -> Path:
    return Path(shutil.copytree(own, tmp_path / "copy"))


@torch.no_grad()
def results(folder: Path) -> dict[str, torch.Tensor]:
    """What the models of a checkpoint compute."""
    pipe = WanT2V.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    ids, mask = pipe.tokenize("A red circle moves from left to right.")
    context = pipe.encode_text(ids, mask)
    noise = torch.randn(1, 16, 2, 4, 4, generator=generator)
    video = torch.rand(1, 3, 5, 32, 32, generator=generator) * 2 - 1
    # The variance is in units of the normalised latents, so it has to move with their deviation.
    distribution = pipe.vae.encode(video[:, :, :1]).latent_dist
    deviation = distribution.std / torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    return {
        "text states": context,
        "forward": pipe.transformer(noise, torch.tensor([500.0]), context, return_dict=False)[0],
        "latents": latents.encode(pipe.vae, video),
        "deviation": deviation,
        "decoded": latents.decode(pipe.vae, noise),
        "sampled": torch.from_numpy(pipe.generate("a cat", size=(48, 32), frame_num=5, seed=3, steps=2)).float(),
    }


def test_all_models_compute_the_same_after_conversion_there_and_back(own, as_published, and_back):
    exact = results(own)
    for folder in (as_published, and_back):
        for name, value in results(folder).items():
            if name == "sampled":
                assert (value - exact[name]).abs().max() <= 1
            else:
                assert relative_error(value, exact[name]) < 1e-5, name
    statistics = [json.loads((folder / "vae/config.json").read_text())["latents_mean"] for folder in (own, and_back)]
    assert statistics[0] != statistics[1] == list(AutoencoderKLWan().config.latents_mean)


def test_settings_tokenizer_and_text_length_are_carried(own, as_published, and_back):
    assert json.loads((as_published / "config.json").read_text())["text_len"] == 64
    first = Checkpoint.open(own)
    for folder in (as_published, and_back):
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.settings_layers == first.settings_layers and checkpoint.own_algorithm
        assert (checkpoint.text_length, checkpoint.heads, checkpoint.positions) == (64, 2, 1024)
        for file in first.tokenizer_folder.iterdir():
            assert (checkpoint.tokenizer_folder / file.name).read_bytes() == file.read_bytes()


def test_the_reference_checkpoint_comes_back_to_the_bit(nano, tmp_path, monkeypatch):
    monkeypatch.setattr("wan.checkpoints.saving.SHARD_BYTES", 300_000)
    lacks = ["the checkpoint has no tokenizer, so neither has the copy, and neither can read prompts"]
    for source, out, layout in ((nano, "there", "diffusers"), (tmp_path / "there", "back", "published")):
        assert convert(Checkpoint.open(source), tmp_path / out, layout) == lacks
    back = tmp_path / "back"
    assert len(list(back.glob("*.safetensors"))) == 3
    config = json.loads((nano / "config.json").read_text())
    del config["_diffusers_version"]
    assert json.loads((back / "config.json").read_text()) == config
    for file in (VAE_FILE, TEXT_ENCODER_FILE, None):
        before, after = (
            dict(WeightFiles.find(folder, SINGLE.split(".")[0]) if file is None else WeightFiles([folder / file]))
            for folder in (nano, back)
        )
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_half_precision_is_kept_but_for_the_folded_convolutions(copy, own, tmp_path):
    file = copy / "vae" / SINGLE
    halved = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halved, file)
    there = dict(WeightFiles([converted(copy, tmp_path / "out", "published") / VAE_FILE]))
    kept_whole = {name for name, tensor in there.items() if tensor.dtype != torch.bfloat16}
    assert kept_whole == {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"}
    video = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        pair = [
            latents.encode(components.vae_component(Checkpoint.open(folder)).load(torch.float32, "cpu"), video)
            for folder in (copy, tmp_path / "out")
        ]
    assert relative_error(*pair) < 1e-5


def test_folding_is_exact_in_float64():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    vae = {"quant_conv.weight": draw(6, 6, 1, 1, 1), "quant_conv.bias": draw(6)}
    vae |= {"post_quant_conv.weight": draw(3, 3, 1, 1, 1), "post_quant_conv.bias": draw(3)}
    own, constants = ({"latents_mean": draw(3).tolist(), "latents_std": draw(3).exp().tolist()} for _ in range(2))
    folded = fold_statistics(vae, own, constants)

    def stages(state, statistics):
        hidden, normalised = torch.arange(6.0, dtype=torch.float64), torch.arange(3.0, dtype=torch.float64)
        mean, deviation = (torch.tensor(statistics[k], dtype=torch.float64) for k in ("latents_mean", "latents_std"))
        moments = state["quant_conv.weight"].flatten(1) @ hidden + state["quant_conv.bias"]
        given = normalised * deviation + mean
        decoded = state["post_quant_conv.weight"].flatten(1) @ given + state["post_quant_conv.bias"]
        return torch.cat(((moments[:3] - mean) / deviation, (moments[3:] / 2).exp() / deviation, decoded))

    torch.testing.assert_close(stages(folded, constants), stages(vae, own), rtol=1e-12, atol=1e-12)


def test_sizes_are_read_off_published_tensors():
    with torch.device("meta"):
        vaes = [
            AutoencoderKLWan(base_dim=16),
            AutoencoderKLWan(base_dim=16, decoder_base_dim=24, dim_mult=[1, 2, 2, 3], num_res_blocks=1),
            AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 4, 4], temperal_downsample=[True, False, True]),
        ]
        text_encoders = [
            UMT5EncoderModel(UMT5Config(vocab_size=900, d_model=192, d_kv=64, d_ff=384, num_layers=4, num_heads=3)),
            UMT5EncoderModel(UMT5Config(vocab_size=7, d_model=8, d_kv=2, d_ff=6, num_layers=1, num_heads=2)),
        ]
        sizes = dict(attention_head_dim=128, num_attention_heads=3, num_layers=2, ffn_dim=1100, text_dim=192)
        transformer = WanTransformer3DModel(**sizes, freq_dim=64, eps=1e-5)

    def settings(model):
        return {key: value for key, value in model.config.items() if key != "_use_default_values"}

    def shapes(model):
        rename = published.tensor_name(model)
        own = {name: tuple(t.shape) for name, t in model.state_dict().items() if name != components.TIED}
        there = {rename(name): shape for name, shape in own.items()}
        assert len(there) == len(own)
        return there

    for vae in vaes:
        plain = {"decoder_base_dim": vae.config.decoder_base_dim or vae.config.base_dim}
        assert settings(vae_of_tensors(shapes(vae))) == settings(vae) | plain
    for model in text_encoders:
        assert published.text_encoder(shapes(model)).config.to_diff_dict() == model.config.to_diff_dict()
    read = published.transformer(published.transformer_config(transformer, 64), shapes(transformer))
    assert settings(read) == settings(transformer)


def test_diffusers_own_pipeline_reads_the_folder(and_back):
    pipe = WanPipeline.from_pretrained(and_back)
    assert pipe.vae.config.base_dim == 8 and pipe.transformer.config.num_layers == 2
    assert pipe.scheduler.config.flow_shift == 2.0
    pipe(prompt="a cat", height=48, width=64, num_frames=1, num_inference_steps=1, max_sequence_length=64)


def test_generate_makes_the_same_picture_from_both(own, as_published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--prompt cat --size 64*48 --frame_num 1 --base_seed 1 --device cpu --save_file".split()
    pictures, said = [], []
    for number, folder in enumerate((own, as_published)):
        assert generate.main([*flags, f"{number}.png", "--ckpt_dir", str(folder)]) == 0
        pictures.append(iio.imread(f"{number}.png").astype(int))
        said.append(capsys.readouterr().err)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert all("attention: nabla-0.6, layers 1 dense" in text and "3 steps" in text for text in said)


@pytest.mark.parametrize("layout", ("published", "diffusers"))
def test_another_attention_takes_the_place_of_its_own(copy, tmp_path, layout, capsys):
    assert Checkpoint.open(copy).resolve({"prompt": "cat"}).attention.dense_layers == (1,)
    flags = ["--ckpt_dir", str(copy), "--layout", layout, "--sparse_algo"]
    assert convert_checkpoint.main([*flags, "keep-0.3", "--out", str(tmp_path / "out")]) == 0
    attention = Checkpoint.open(tmp_path / "out").resolve({"prompt": "cat"}).attention
    assert (attention.keep, attention.threshold, attention.dense_layers) == (0.3, None, (1,))
    capsys.readouterr()
    assert convert_checkpoint.main([*flags, "keep-3", "--out", str(tmp_path / "bad")]) == 2
    assert capsys.readouterr().err.startswith("error: keep 3") and not (tmp_path / "bad").exists()


def test_what_is_left_behind_is_said(copy, nano, tmp_path, capsys):
    edit_json(copy / SCHEDULER, flow_shift=9.0)
    (copy / "LICENSE.txt").touch()
    flags = ["--ckpt_dir", str(copy), "--out", str(tmp_path / "out"), "--layout", "published"]
    assert convert_checkpoint.main(flags) == 0
    assert capsys.readouterr().out.splitlines() == [
        "not carried over: LICENSE.txt",
        "not carried over: scheduler",
        f"wrote {tmp_path / 'out'} in the published layout",
    ]
    edit_json(tmp_path / "out" / "config.json", window_size=[-1, -1])
    lines = convert(Checkpoint.open(tmp_path / "out"), tmp_path / "back", "diffusers")
    assert lines == ["not carried over: window_size of config.json"]


def edit_weights(file: Path, **changes: torch.Tensor) -> None:
    save_file(load_file(file) | changes, file)


@pytest.mark.parametrize(
    "damage, message",
    (
        (lambda c: edit_json(c / "vae/config.json", latents_std=[1.0] * 15), "latents_std is .* must be 16 numbers"),
        (lambda c: edit_json(c / "vae/config.json", latents_std=[0.0] * 16), "must be above 0"),
        (lambda c: edit_json(c / "vae/config.json", latents_mean=None), "latents_mean is None"),
        (lambda c: edit_json(c / "transformer/config.json", eps=1e-5, rope_max_seq_len=64), "rope_max_seq_len is 64"),
        (lambda c: edit_json(c / "transformer/config.json", text_len=0), "text_len is 0"),
        (lambda c: edit_json(c / "text_encoder/config.json", layer_norm_epsilon=1e-5), "layer_norm_epsilon is 1e-05"),
        (lambda c: (c / "vae" / SINGLE).write_bytes(b"x" * 999), "is truncated or corrupt"),
        (lambda c: (c / "tokenizer/tokenizer.json").write_text("{"), "is truncated or corrupt"),
        (lambda c: edit_weights(c / "vae" / SINGLE, more=torch.ones(1)), "tensor 'more' does not belong"),
        (
            lambda c: edit_weights(c / "vae" / SINGLE, **{"quant_conv.bias": torch.ones(32, dtype=torch.int8)}),
            "tensor 'quant_conv.bias' is torch.int8",
        ),
        (
            lambda c: edit_weights(c / "text_encoder/model.safetensors", **{components.TIED: torch.ones(512, 64)}),
            "'shared.weight' differ",
        ),
    ),
)
def test_bad_checkpoints_are_one_line_and_leave_nothing(copy, tmp_path, capsys, damage, message):
    damage(copy)
    code = convert_checkpoint.main(["--ckpt_dir", str(copy), "--out", str(tmp_path / "out"), "--layout", "published"])
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and re.search(message, said), said
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_vae_of_other_channels_is_refused(copy, tmp_path):
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    shutil.rmtree(copy / "vae")
    vae.save_pretrained(copy / "vae")
    with pytest.raises(components.CheckpointError, match="z_dim is 4"):
        convert(Checkpoint.open(copy), tmp_path / "out", "published")


def test_a_second_copy_of_the_tokens_is_written_once(copy, tmp_path):
    file = copy / "text_encoder" / "model.safetensors"
    edit_weights(file, **{components.TIED: load_file(file)["shared.weight"].clone()})
    there = WeightFiles([converted(copy, tmp_path / "out", "published") / TEXT_ENCODER_FILE])
    assert "token_embedding.weight" in there.shapes and components.TIED not in there.shapes


def test_wrong_places(own, as_published, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for source, out, layout, message in (
        (own, "new", "diffusers", "is in the diffusers layout already"),
        (as_published, "new", "published", "is in the published layout already"),
        (own, "file", "published", "is there already"),
        (own, "link", "published", "is there already"),
        (own, "full", "published", "is there already"),
        (own, "file/new", "published", "File exists"),
        (tmp_path / "nothing", "new", "published", "is neither a directory nor a hub id"),
    ):
        flags = ["--ckpt_dir", str(source), "--out", str(tmp_path / out), "--layout", layout]
        assert convert_checkpoint.main(flags) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and message in said
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="layout 'both' is not known"):
        convert(Checkpoint.open(own), tmp_path / "new", "both")


def test_an_empty_folder_is_taken(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert_checkpoint.main(["--ckpt_dir", str(own), "--out", ".", "--layout", "published"]) == 0
    assert Checkpoint.open(tmp_path).published


@pytest.mark.parametrize("layout", ("published", "diffusers"))
def test_a_full_disk_leaves_nothing(own, as_published, tmp_path, capsys, layout):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    source = str(own if layout == "published" else as_published)
    try:
        # A limit of one file's size stands for the disk's.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        code = convert_checkpoint.main(["--ckpt_dir", source, "--out", str(tmp_path / "out"), "--layout", layout])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "cannot be written" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ("published", "diffusers"))
def test_another_dtype(own, layout, tmp_path):
    assert convert(Checkpoint.open(own), tmp_path / "half", layout, torch.float16) == []
    before, after = (components.transformer_component(Checkpoint.open(folder)) for folder in (own, tmp_path / "half"))
    wanted = dict(before.tensors())
    for name, tensor in after.tensors():
        assert torch.equal(tensor, wanted[name].half()), name
