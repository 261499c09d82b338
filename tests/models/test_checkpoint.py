"""Loading: both layouts, strictly, in little memory; every damage is one clear line."""

from __future__ import annotations

import fnmatch
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import weight_files
from conftest import DATA
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import wan
from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components, random_checkpoint
from wan.models.wan.layout import TEXT_ENCODER_FILE, TOKENIZER_FOLDER, VAE_FILE
from wan.models.wan.vae import decoder_dtype

SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
SINGLE = "diffusion_pytorch_model.safetensors"


def load_models(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Module]:
    checkpoint = Checkpoint.open(folder)
    return {
        "transformer": components.load_transformer(components.transformer_component(checkpoint), dtype, "cpu"),
        "vae": components.vae_component(checkpoint).load(dtype, "cpu"),
        "text_encoder": components.text_encoder_component(checkpoint, dtype).load(dtype, "cpu"),
    }


@pytest.fixture
def copy(nano, tmp_path) -> Path:
    return Path(shutil.copytree(nano, tmp_path / "copy"))


@pytest.fixture(scope="module")
def diffusers_layout(random_nano, tmp_path_factory) -> Path:
    """`random_nano` saved by the libraries' own methods."""
    folder = tmp_path_factory.mktemp("diffusers")
    for name, model in load_models(random_nano).items():
        model.save_pretrained(folder / name)
    components.load_tokenizer(Checkpoint.open(random_nano), 512).save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return folder


def test_published_names_and_shapes_are_those_of_the_real_checkpoints():
    known = json.loads((DATA / "wan21_keys.json").read_text())
    for model in ("t2v-14B", "t2v-1.3B"):
        sizes = random_checkpoint.MODELS[model]
        shapes = random_checkpoint.transformer_shapes(sizes)
        one_block = {
            name: list(shape) for name, shape in shapes.items() if not name.startswith("blocks.") or ".0." in name[:9]
        }
        assert one_block == known[model]["keys"]
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == known[model]["parameters"]
    for key, made in (
        ("umt5-xxl encoder", random_checkpoint.text_encoder_shapes(sizes)),
        ("vae", random_checkpoint.vae_shapes(sizes)),
    ):
        one_block = {n: list(s) for n, s in made.items() if not n.startswith("blocks.") or n.startswith("blocks.0.")}
        assert one_block == known[key]["keys"]
        assert sum(torch.Size(shape).numel() for shape in made.values()) == known[key]["parameters"]


def test_both_layouts_give_the_same_video(random_nano, diffusers_layout):
    settings = dict(size=(96, 80), frame_num=5, seed=3, steps=2)
    videos = [wan.WanT2V.from_pretrained(f).generate("a cat", **settings) for f in (random_nano, diffusers_layout)]
    assert (videos[0] == videos[1]).all()


def test_single_file_equals_shards(nano, copy):
    shards = sorted(copy.glob("*.safetensors"))
    save_file({k: v for shard in shards for k, v in load_file(shard).items()}, copy / SINGLE)
    for file in (*shards, *copy.glob("*.index.json")):
        file.unlink()
    ours, whole = (load_models(folder)["transformer"].state_dict() for folder in (nano, copy))
    assert ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in ours)


def test_bf16_keeps_norms_modulations_and_time_embedding_in_float32(nano):
    transformer = load_models(nano, torch.bfloat16)["transformer"]
    kinds = {name: tensor.dtype for name, tensor in transformer.named_parameters()}
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    for name in (
        "blocks.0.scale_shift_table",
        "blocks.0.norm2.weight",
        "condition_embedder.time_embedder.linear_1.weight",
    ):
        assert kinds[name] == torch.float32
    assert transformer.rope.freqs_cos.dtype == torch.float32 and transformer.dtype == torch.bfloat16


def test_the_attention_that_a_checkpoint_names_is_the_default(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"sparse_algo": "nabla-0.6_sta-11-3-3"}))
    pipe = wan.WanT2V.from_pretrained(copy)
    assert pipe.transformer.nabla.config.algorithm == "nabla-0.6_sta-11-3-3"


def test_a_window_that_a_checkpoint_names_runs_its_first_steps_dense(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"sparse_algo": "sta-3-3-3"}))
    assert wan.WanT2V.from_pretrained(copy).transformer.nabla.config.dense_steps == 12


def test_all_that_a_checkpoint_s_defaults_name_is_taken_unless_arguments_say_else(damaged):
    factors = weight_files.draw_factors(wan.WanT2V.from_pretrained(damaged).transformer)
    lora = weight_files.write_lora(damaged / "style.safetensors", factors)
    plain = wan.WanT2V.from_pretrained(damaged, dtype=torch.bfloat16).transformer.state_dict()
    defaults = f"dtype: bfloat16\nvae_dtype: bfloat16\nlora: ['{lora}:0.5']\ncache: first_block:0.1\n"
    (damaged / "defaults.yaml").write_text(defaults)
    name = "blocks.0.attn1.to_q.weight"

    pipe = wan.WanT2V.from_pretrained(damaged)
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.cache.settings.threshold == 0.1
    assert decoder_dtype(pipe.vae) == torch.bfloat16
    assert not torch.equal(pipe.transformer.state_dict()[name], plain[name])

    pipe = wan.WanT2V.from_pretrained(damaged, lora=(), cache="none", dtype=torch.float32, vae_dtype=torch.float32)
    assert pipe.cache is None and pipe.transformer.dtype == decoder_dtype(pipe.vae) == torch.float32
    assert torch.equal(pipe.transformer.state_dict()[name].bfloat16(), plain[name])


def test_a_transformer_that_a_checkpoint_s_defaults_name_is_taken(damaged):
    state = load_models(damaged)["transformer"].state_dict()
    file = damaged.parent / "single.safetensors"
    save_file({key: torch.zeros_like(value) for key, value in state.items()}, file)
    (damaged / "defaults.yaml").write_text(f"transformer: {file}\n")
    assert not wan.WanT2V.from_pretrained(damaged).transformer.proj_out.weight.any()


def test_defaults_that_cannot_run_here_are_an_error_unless_arguments_say_else(damaged):
    (damaged / "defaults.yaml").write_text("fp8: true\n")
    for dtype in (None, torch.bfloat16):
        with pytest.raises(InputError, match="fp8 does not work on cpu: it needs an NVIDIA GPU"):
            wan.WanT2V.from_pretrained(damaged, dtype=dtype)
    wan.WanT2V.from_pretrained(damaged, fp8=False)
    (damaged / "defaults.yaml").write_text("cache: mag\n")
    with pytest.raises(InputError, match="cache mag needs the ratios"):
        wan.WanT2V.from_pretrained(damaged)


def test_tokenizer_reads_tokenizer_json_as_it_is(random_nano):
    pipe = wan.WanT2V.from_pretrained(random_nano)
    ids, mask = pipe.tokenize(["A  red &amp;amp; blue\n circle", "一只猫"])
    exact = PreTrainedTokenizerFast(tokenizer_file=str(random_nano / TOKENIZER_FOLDER / "tokenizer.json"))
    for row, kept, text in zip(ids, mask, ("A red & blue circle", "一只猫")):
        wanted = exact(text).input_ids
        assert row[: len(wanted)].tolist() == wanted and row[len(wanted) :].eq(0).all()
        assert kept.sum() == len(wanted) and wanted[-1] == 1
    assert ids.shape == mask.shape == (2, 512)


def test_a_long_prompt_is_cut_to_the_text_length(random_nano):
    ids, mask = wan.WanT2V.from_pretrained(random_nano).tokenize(["red circle " * 600])
    assert ids.shape == (1, 512) and mask.all() and ids[0, -1] == 1


def change(folder: Path, file: str, edit) -> None:
    path = folder / file
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "edit, message",
    (
        (lambda t: t.pop("blocks.0.self_attn.q.weight"), "tensor 'blocks.0.self_attn.q.weight' is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "tensor 'extra' does not belong to this model"),
        (
            lambda t: t.update({"blocks.0.ffn.0.bias": torch.ones(7)}),
            r"tensor 'blocks.0.ffn.0.bias' is \(7,\), but must be \(128,\)",
        ),
        (
            lambda t: t.update({"blocks.0.ffn.0.bias": torch.ones(128, dtype=torch.int8)}),
            "tensor 'blocks.0.ffn.0.bias' is torch.int8",
        ),
        (lambda t: t.update({"blocks.2.ffn.0.bias": torch.ones(128)}), "which another of the files holds too"),
    ),
)
def test_missing_extra_and_misshapen_tensors_are_named(copy, edit, message):
    change(copy, SHARD, edit)
    with pytest.raises(CheckpointError, match=message):
        wan.WanT2V.from_pretrained(copy)


@pytest.mark.parametrize("file", (SHARD, TEXT_ENCODER_FILE, VAE_FILE))
@pytest.mark.parametrize("keep", (0, 7, 0.5, 0.98))
def test_truncated_files(copy, file, keep):
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=rf"{file} is truncated or corrupt .*; download it again"):
        wan.WanT2V.from_pretrained(copy)


@pytest.mark.parametrize("file", (SHARD, TEXT_ENCODER_FILE, VAE_FILE))
def test_overwritten_files(copy, file):
    (copy / file).write_bytes(b"<html>404: not found</html>" * 40)
    with pytest.raises(CheckpointError, match="is truncated or corrupt"):
        wan.WanT2V.from_pretrained(copy)


@pytest.mark.parametrize("file", ("config.json", SHARD, TEXT_ENCODER_FILE, VAE_FILE))
def test_missing_parts(copy, file):
    (copy / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file} is missing"):
        wan.WanT2V.from_pretrained(copy)


def test_no_transformer_at_all(copy):
    for file in (*copy.glob("*.safetensors"), *copy.glob("*.index.json")):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no diffusion_pytorch_model"):
        wan.WanT2V.from_pretrained(copy)


@pytest.mark.parametrize("weight_map", (None, [], "x", {"a": 1}, {"a": "../x.safetensors"}))
def test_an_index_that_makes_no_sense(copy, weight_map):
    (copy / f"{SINGLE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="does not say which file holds which tensor"):
        wan.WanT2V.from_pretrained(copy)


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bytes_in_a_pickle_are_one_clear_line_or_harmless(copy, seed):
    data = bytearray((copy / TEXT_ENCODER_FILE).read_bytes())
    generator = random.Random(seed)
    for _ in range(20):
        data[generator.randrange(6000)] = generator.randrange(256)
    (copy / TEXT_ENCODER_FILE).write_bytes(bytes(data))
    try:
        wan.WanT2V.from_pretrained(copy)
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "index, message",
    (
        ({"_class_name": "WanVACEPipeline"}, "transformer/config.json is missing"),
        ({"_class_name": "WanAnimatePipeline"}, "is an animation model .*wan.apply_attention"),
        ({"_class_name": "WanOtherPipeline"}, "is a WanOtherPipeline; only Wan and Kandinsky-5 checkpoints"),
    ),
)
def test_other_pipelines_of_diffusers(copy, index, message):
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        wan.WanT2V.from_pretrained(copy)


def test_code_in_a_pickle_is_not_run(copy, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "boom",)

    torch.save({"encoder.conv1.weight": Bomb()}, copy / VAE_FILE)
    with pytest.raises(CheckpointError, match="is truncated or corrupt"):
        wan.WanT2V.from_pretrained(copy)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "config, message",
    (
        ("{", "config.json cannot be read as JSON"),
        ("[]", "config.json does not hold a JSON object"),
        ('{"model_type": "i2v"}', "num_heads is None"),
        ('{"dim": 64}', "num_heads is None, but must be a positive integer"),
        ('{"dim": "64", "num_heads": 0}', "num_heads is 0"),
        ('{"text_len": null}', "text_len is None"),
    ),
)
def test_bad_configuration(copy, config, message):
    (copy / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        wan.WanT2V.from_pretrained(copy)


def test_a_checkpoint_without_tokenizer_serves_all_but_prompts(nano):
    pipe = wan.WanT2V.from_pretrained(nano)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        pipe.generate("a cat", size=(64, 64), frame_num=1, steps=1)
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        Checkpoint.open(nano).require_tokenizer()


def test_a_checkpoint_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="hf download Wan-AI/none --local-dir DIR.*make_random_checkpoint.py"):
        Checkpoint.open("Wan-AI/none")
    with pytest.raises(CheckpointError, match="neither a directory nor a hub id"):
        Checkpoint.open("/no/such/directory")


def test_a_hub_id_is_downloaded_configuration_first(monkeypatch, random_nano):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns, ignore_patterns))
        return str(random_nano)

    monkeypatch.setattr("wan.checkpoints.locate.snapshot_download", download)
    checkpoint = Checkpoint.open("Wan-AI/Wan2.1-T2V-1.3B")
    assert checkpoint.name == "Wan-AI/Wan2.1-T2V-1.3B" and checkpoint.folder == random_nano
    assert [name for name, *_ in asked] == ["Wan-AI/Wan2.1-T2V-1.3B"] * 2
    assert not any(pattern.endswith((".pth", ".safetensors")) for pattern in asked[0][1])
    for file in random_nano.rglob("*.*"):
        relative = file.relative_to(random_nano).as_posix()
        assert file.is_dir() or any(fnmatch.fnmatch(relative, pattern) for pattern in asked[1][1]), relative
    assert asked[1][2] is None
    Checkpoint.open("Wan-AI/Wan2.1-T2V-1.3B", transformer="other.safetensors")
    left_out = [f"transformer/{SINGLE}", SINGLE, SHARD, f"vae/{SINGLE}", f"text_encoder/{SINGLE}", VAE_FILE]
    assert [any(fnmatch.fnmatch(file, pattern) for pattern in asked[3][2]) for file in left_out] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_seeds_and_strings_of_the_pipeline(random_nano):
    pipe = wan.WanT2V.from_pretrained(random_nano, "nabla-0.7")
    assert pipe.transformer.nabla.config.threshold == 0.7
    small = dict(size="64*48", frame_num=1, steps=1)
    same = [pipe.generate("a cat", seed=3, **small) for _ in range(2)]
    drawn = [pipe.generate("a cat", **small), pipe.generate("a cat", seed=-1, **small)]
    assert (same[0] == same[1]).all() and (drawn[0] != drawn[1]).any()
    with pytest.raises(InputError, match="4097 frames of .* are too many; at most 4093"):
        pipe.generate("a cat", size=(16, 16), frame_num=4097, steps=1)
    with pytest.raises(InputError, match="is not known"):
        wan.WanT2V.from_pretrained(random_nano, "nabla")


def test_an_algorithm_that_is_not_understood_can_be_overridden(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"sparse_algo": "weird"}))
    with pytest.raises(CheckpointError, match="copy, sparse_algo of its configuration: .*'weird' is not known"):
        wan.WanT2V.from_pretrained(copy)
    assert wan.WanT2V.from_pretrained(copy, "dense").transformer.nabla.config.is_dense


def test_a_random_checkpoint_is_not_written_over_anything(random_nano):
    with pytest.raises(InputError, match="is not empty"):
        random_checkpoint.write("nano", random_nano, torch.float32)


def test_wrong_inputs_to_the_pipeline(random_nano):
    pipe = wan.WanT2V.from_pretrained(random_nano)
    context = torch.zeros(1, 600, 64)
    with pytest.raises(InputError, match="600 rows are too long"):
        pipe.sample(context, context, noise=torch.zeros(1, 16, 1, 8, 8), steps=1)
    with pytest.raises(InputError, match="600 rows are too long"):
        pipe.encode_text(torch.zeros(1, 600, dtype=torch.long), torch.ones(1, 600, dtype=torch.long))
    with pytest.raises(InputError, match="values that are not finite"):
        pipe.sample(context[:, :5], guide_scale=1, noise=torch.full((1, 16, 1, 8, 8), torch.nan), steps=1)
    with pytest.raises(InputError, match="needs negative text states"):
        pipe.sample(context[:, :5], noise=torch.zeros(1, 16, 1, 8, 8), steps=1)
    with pytest.raises(InputError, match="6 frames of 64.64 cannot be encoded"):
        pipe.encode_video(torch.zeros(3, 6, 64, 64))


def test_loading_needs_no_more_memory_than_the_result_and_one_shard(tmp_path, monkeypatch):
    """A float32 transformer of 300 MB in shards of 50 MB, loaded to 150 MB of bfloat16."""
    small = {
        field: getattr(random_checkpoint.MODELS["nano"], field) for field in ("text_dim", "text_heads", "vocabulary")
    }
    sizes = random_checkpoint.Sizes(1024, 8, 4, 4096, text_layers=1, text_ffn_dim=64, vae_dim=8, **small)
    monkeypatch.setitem(random_checkpoint.MODELS, "some", sizes)
    monkeypatch.setattr("wan.checkpoints.saving.SHARD_BYTES", 50 * 2**20)
    random_checkpoint.write("some", tmp_path, torch.float32)
    code = (
        "import sys, torch\n"
        "from wan.models.checkpoint import Checkpoint\n"
        "from wan.models.wan.components import load_transformer, transformer_component\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024\n"
        "checkpoint = Checkpoint.open(sys.argv[1])\n"
        "before = peak()\n"
        "model = load_transformer(transformer_component(checkpoint), torch.bfloat16, 'cpu')\n"
        "print(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20, peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, cwd=Path(wan.__file__).parents[1], check=True, capture_output=True, text=True)
    size, grown = map(float, run.stdout.split())
    assert size > 125
    assert grown < size + 50 + 50
