"""What is no checkpoint, is quantised otherwise, cannot be read here, or says sizes without end: named as it is."""

from __future__ import annotations

import errno
import json
import shutil
import time

import pytest
import torch
import weight_files
from safetensors.torch import load_file, save_file

from nabla import InputError
from wan.checkpoints.file_errors import clear_errors, require_file, unreadable
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.convert import convert
from wan.models.wan.layout import TEXT_ENCODER_FILE, VAE_FILE

LAYER = "blocks.0.ffn.0"


@pytest.fixture(scope="module")
def checkpoint(random_nano):
    return Checkpoint.open(random_nano)


@pytest.fixture(scope="module")
def published(random_nano):
    return load_file(next(random_nano.glob("*.safetensors")))


@pytest.fixture(scope="module")
def diffusers(random_nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout") / "diffusers"
    convert(Checkpoint.open(random_nano), folder, "diffusers")
    return folder


@pytest.fixture
def copied(diffusers, tmp_path):
    return shutil.copytree(diffusers, tmp_path / "copied")


def marker(**said):
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def header(**said):
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {LAYER: said}})}


def refused(act, message):
    with pytest.raises(InputError, match=message) as raised:
        act()
    said = str(raised.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("where", ("tensors", "header"))
def test_float8_that_is_marked_as_such_is_read(checkpoint, published, tmp_path, where):
    exact = weight_files.write_float8(tmp_path / "a.safetensors", published)
    said = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    tensors = load_file(tmp_path / "a.safetensors")
    if where == "tensors":
        tensors[f"model.diffusion_model.{LAYER}.comfy_quant"] = marker(**said)
    save_file(tensors, tmp_path / "a.safetensors", header(**said) if where == "header" else None)
    read = dict(components.transformer_component(checkpoint, tmp_path / "a.safetensors").weights)
    assert all(torch.equal(read[name].float(), exact[name]) for name in exact)


@pytest.mark.parametrize(
    "extra, metadata, message",
    (
        ({"comfy_quant": marker(format="int8_tensorwise", convrot=True)}, None, "says .*int8_tensorwise.*convrot"),
        ({"comfy_quant": marker(format="float8_e4m3fn", convrot=True)}, None, "convrot"),
        ({"comfy_quant": torch.full((3,), 255, dtype=torch.uint8)}, None, "cannot be read"),
        ({"comfy_quant": torch.ones(3)}, None, "is no text in bytes"),
        ({}, header(format="nvfp4"), "_quantization_metadata of 'blocks.0.ffn.0' says .*nvfp4"),
        ({}, header(format="mxfp8"), "mxfp8"),
        ({}, {"_quantization_metadata": "{"}, "is quantised, and _quantization_metadata cannot be read"),
        ({}, {"_quantization_metadata": "{}"}, "is quantised in a way that is not read"),
        ({"weight_scale_2": torch.ones(1)}, None, r"nvfp4, by two scales.*weight_scale_2"),
        ({"SCB": torch.ones(256)}, None, "bitsandbytes"),
        ({"qweight": torch.ones(256, dtype=torch.int32)}, None, "GPTQ or AWQ"),
        ({"new_kind_of_scale": torch.ones(256)}, None, "it holds 'blocks.0.ffn.0.new_kind_of_scale'"),
        ({"weight": torch.ones(256, 128, dtype=torch.int8)}, None, "'blocks.0.ffn.0.weight' is stored as I8"),
        ({"weight_scale": torch.ones(64, 4)}, None, r"a scale is \(64, 4\); only one, or one a row, is read"),
        ({"weight_scale": torch.ones(256, dtype=torch.uint8)}, None, "only one, or one a row, is read"),
        ({"weight": torch.ones(256, 128).to(torch.float8_e8m0fnu)}, None, "is stored as F8_E8M0, which is not read"),
    ),
)
def test_quantisations_that_are_not_understood(checkpoint, published, tmp_path, extra, metadata, message):
    file = tmp_path / "a.safetensors"
    save_file(published | {f"{LAYER}.{name}": tensor for name, tensor in extra.items()}, file, metadata)
    assert "a.safetensors" in refused(lambda: components.transformer_component(checkpoint, file), message)


def test_gguf_with_folded_axes_is_read_and_unknown_types_are_named(checkpoint, published, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-gguf.txt")
    file, first = tmp_path / "a.gguf", "patch_embedding.weight"

    def write(patch, kind=None):
        writer = gguf.GGUFWriter(file, "wan")
        for name, tensor in published.items():
            array = tensor.float().numpy()
            if kind and name == f"{LAYER[:-1]}2.weight":
                writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, array.reshape(patch) if name == first else array)
        for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
            getattr(writer, step)()

    for patch in ((128 * 16, 1, 2, 2), (128, 64)):
        write(patch)
        model = components.load_transformer(components.transformer_component(checkpoint, file), torch.float32, "cpu")
        assert torch.equal(model.patch_embedding.weight, published[first])
    write((128, 64), gguf.GGMLQuantizationType.TQ1_0)
    refused(
        lambda: components.transformer_component(checkpoint, file), "a.gguf: tensor 'blocks.0.ffn.2.weight' is TQ1_0"
    )


def test_what_cannot_be_read_is_no_damage(tmp_path):
    file = tmp_path / "a.safetensors"
    for error, message in (
        (PermissionError(errno.EACCES, "Permission denied"), "may not be read by this user"),
        (MemoryError("Cannot allocate memory (os error 12)"), "too little memory or address space"),
        (RuntimeError("unable to mmap 300 bytes from file: Cannot allocate memory"), "too little memory"),
        (OSError(errno.EIO, "Input/output error"), "cannot be read .Input/output error"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "longer name than a file can have"),
    ):

        def fail(error=error):
            with clear_errors(file):
                raise error

        for said in (refused(fail, message), unreadable(file, error)):
            assert "again" not in said and "corrupt" not in said
    refused(lambda: require_file(tmp_path), "is a folder")
    refused(lambda: require_file(tmp_path / ("n" * 300)), "longer name")
    refused(lambda: Checkpoint.open("n" * 300), "longer name")
    refused(lambda: Checkpoint.open(f"{tmp_path}/{'n' * 300}"), "longer name")


@pytest.mark.parametrize("file", ("config.json", TEXT_ENCODER_FILE, VAE_FILE, "google/umt5-xxl/tokenizer.json"))
def test_a_folder_in_place_of_a_file(damaged, file):
    (damaged / file).unlink()
    (damaged / file).mkdir()

    def load():
        checkpoint = Checkpoint.open(damaged)
        components.vae_component(checkpoint), components.text_encoder_component(checkpoint, torch.float32)
        components.load_tokenizer(checkpoint, 512)

    refused(load, f"{file} is a folder, and a file is needed there")


def test_pickles_of_other_things_than_dense_tensors(damaged):
    for content, message in (
        ([torch.ones(1)], "does not hold tensors by their names"),
        ({"a": 3}, "'a' is no tensor"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is sparse or quantised"),
        ({"a": torch.ones(1, device="meta")}, "'a' has no data"),
    ):
        torch.save(content, damaged / VAE_FILE)
        assert "again" not in refused(lambda: components.vae_component(Checkpoint.open(damaged)), message)


def test_wrong_folders_and_files_are_said_to_be_what_they_are(random_nano, diffusers, tmp_path):
    shutil.copytree(random_nano, tmp_path / "above" / "nano")
    (tmp_path / "models").mkdir()
    single = shutil.copy(next(random_nano.glob("*.safetensors")), tmp_path / "models" / "wan.safetensors")
    for path, message in (
        (tmp_path / "above", "is the folder above a checkpoint; give .*nano"),
        (tmp_path / "models", "holds 'wan.safetensors', which may be given as --transformer"),
        (single, "is a single file; give it as --transformer"),
        ("models/none.gguf", "a file of weights, which is not here"),
        *((diffusers / part, "one part of a checkpoint in diffusers' layout; give .*diffusers") for part in DIFFUSERS),
    ):
        said = refused(lambda path=path: Checkpoint.open(path), message)
        assert "download" not in said


DIFFUSERS = ("transformer", "vae", "text_encoder")


@pytest.mark.parametrize(
    "tensor, message",
    (
        ("img_emb.proj.1.weight", "of no kind of Wan that is supported: .*16 channels .* sees pictures"),
        ("vace_patch_embedding.weight", "is a transformer of vace, Wan2.1 VACE, and checkpoint .* is t2v"),
        ("audio_injector.bias", "is a transformer of speech-to-video"),
    ),
)
def test_transformers_of_other_kinds(checkpoint, published, tmp_path, tensor, message):
    save_file(published | {tensor: torch.ones(3)}, tmp_path / "a.safetensors")
    refused(lambda: components.transformer_component(checkpoint, tmp_path / "a.safetensors"), message)


@pytest.mark.parametrize(
    "part, key, value, message",
    (
        ("transformer", "num_layers", 10**9, "num_layers is 1000000000, but .* most|its files hold 2 layers"),
        ("transformer", "num_layers", 3, "num_layers is 3, but its files hold 2 layers"),
        ("transformer", "text_len", 10**9, "text_len is 1000000000, but can be at most 4096"),
        ("transformer", "text_len", 1e30, "text_len is 1e.30, not a positive integer"),
        ("transformer", "rope_max_seq_len", 10**9, "rope_max_seq_len is 1000000000, but can be at most"),
        ("transformer", "eps", [1], r"eps is \[1\], but must be a number"),
        ("transformer", "patch_size", [1, 2], "patch_size is .*must be 3 positive integers"),
        ("transformer", "num_attention_heads", 10**30, "num_attention_heads is 10+, but can be at most"),
        ("vae", "num_res_blocks", 10**9, "num_res_blocks is 1000000000, but can be at most"),
        ("vae", "num_res_blocks", 7, "say 28 residual blocks of the encoder, its files"),
        ("vae", "dim_mult", [1] * 10**4, r"dim_mult is \[1, 1,"),
        ("vae", "temperal_downsample", "yes", "temperal_downsample is 'yes'"),
        ("text_encoder", "num_layers", 10**9, "num_layers is 1000000000"),
        ("text_encoder", "vocab_size", 10**12, "vocab_size is 1000000000000, but can be at most"),
        ("text_encoder", "layer_norm_epsilon", "x", "layer_norm_epsilon is 'x', but must be a number"),
        ("text_encoder", "is_decoder", True, "an encoder is needed"),
    ),
)
def test_sizes_are_held_against_the_tensors_before_anything_is_built(copied, part, key, value, message):
    file = copied / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    load = {
        "transformer": lambda: components.transformer_component(Checkpoint.open(copied)),
        "vae": lambda: components.vae_component(Checkpoint.open(copied)),
        "text_encoder": lambda: components.text_encoder_component(Checkpoint.open(copied), torch.float32),
    }[part]
    began = time.process_time()
    refused(load, message)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "file, name, load",
    (
        (
            TEXT_ENCODER_FILE,
            "blocks.999999999.norm1.weight",
            lambda c: components.text_encoder_component(c, torch.float32),
        ),
        (VAE_FILE, "encoder.downsamples.999999999.resample.1.weight", components.vae_component),
    ),
)
def test_numbers_in_names_count_nothing(damaged, file, name, load):
    torch.save(torch.load(damaged / file, weights_only=True) | {name: torch.ones(1)}, damaged / file)
    began = time.process_time()
    refused(lambda: load(Checkpoint.open(damaged)), "is missing, but there are")
    assert time.process_time() - began < 1


def test_layers_of_the_published_layout(damaged):
    file = damaged / "config.json"
    config = json.loads(file.read_text())
    for changed, message in (
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_heads": 3}, "dim 128 is not 3 heads"),
        ({"eps": "x"}, "eps is 'x'"),
        ({"rope_max_seq_len": "x"}, "rope_max_seq_len is 'x'"),
    ):
        file.write_text(json.dumps(config | changed))
        refused(lambda: components.transformer_component(Checkpoint.open(damaged)), message)
    file.write_text('{"a":' * 100_000)
    refused(lambda: Checkpoint.open(damaged), "nested more than 100 deep")
