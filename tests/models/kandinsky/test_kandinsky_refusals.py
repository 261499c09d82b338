"""What cannot be run as Kandinsky-5: one line that says what it is, exit code 2, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import generate
import wan
from nabla import InputError
from scripts import convert_checkpoint
from wan import Checkpoint, CheckpointError
from wan.models.kandinsky.family import KANDINSKY
from wan.models.kandinsky.layout import SIZES

SMALL = {"--size": "128*64", "--frame_num": "1", "--sample_steps": "1", "--device": "cpu", "--prompt": "A cat"}
SMALL |= {"--save_file": "out.png"}
TRANSFORMER = "model/kandinsky5lite_t2v_sft_10s.safetensors"
WEIGHTS = (
    TRANSFORMER,
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder2/model.safetensors",
)
# A tensor of each that tells no size of its model.
INNER = {
    TRANSFORMER: "visual_transformer_blocks.1.feed_forward.out_layer.weight",
    WEIGHTS[1]: "decoder.conv_out.conv.weight",
    WEIGHTS[2]: "model.layers.0.mlp.up_proj.weight",
    WEIGHTS[3]: "text_model.encoder.layers.0.mlp.fc1.weight",
}
I2V, T2V = "kandinsky5_pro_i2v_5s_sd.yaml", "kandinsky5_lite_sft_10s.yaml"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused(*flags)`: what generate.py says, in one line, of what it does not run."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))

    def refused(*flags: object) -> str:
        given = [str(flag) for flag in flags]
        rest = [word for flag, value in SMALL.items() if flag not in given for word in (flag, value)]
        assert generate.main([*rest, *given]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
        assert not any(Path().iterdir())
        return said.removeprefix("error: ").rstrip("\n")

    return refused


@pytest.fixture
def copied(kandinsky_nano, tmp_path):
    return Path(shutil.copytree(kandinsky_nano, tmp_path / "copied"))


@pytest.fixture
def as_diffusers(kandinsky_diffusers, tmp_path):
    return Path(shutil.copytree(kandinsky_diffusers, tmp_path / "diffusers"))


@pytest.mark.parametrize(
    "lost, message",
    (
        ("vae", "has no vae/, and vae hunyuanvideo-community/HunyuanVideo .* pass --vae DIR$"),
        (
            "text_encoder",
            "has no text_encoder/, and text_encoder Qwen/Qwen2.5-VL-7B-Instruct .* pass --text_encoder DIR",
        ),
        ("text_encoder2", "has no text_encoder2/, and text_encoder_2 openai/clip-vit-.* pass --text_encoder_2 DIR"),
        ("text_encoder/tokenizer.json", "text_encoder/tokenizer.json is missing, so prompts cannot be read"),
        ("text_encoder2/tokenizer.json", "text_encoder2/tokenizer.json is missing, so prompts cannot be read"),
        ("vae/config.json", "vae has no config.json, so it is no vae of Kandinsky-5; give it with --vae DIR"),
        (WEIGHTS[1], r"vae has no diffusion_pytorch_model\*.safetensors; the checkpoint is incomplete"),
        (WEIGHTS[2], r"text_encoder has no model\*.safetensors; the checkpoint is incomplete"),
        (WEIGHTS[3], r"text_encoder2 has no model\*.safetensors; the checkpoint is incomplete"),
    ),
)
def test_missing_parts_of_a_native_folder(refused, copied, lost, message):
    shutil.rmtree(copied / lost) if (copied / lost).is_dir() else (copied / lost).unlink()
    matches(refused("--ckpt_dir", copied), message)


@pytest.mark.parametrize(
    "lost, message",
    (
        ("transformer", "transformer/config.json is missing; download the checkpoint again"),
        ("transformer/diffusion_pytorch_model.safetensors", "transformer has no diffusion_pytorch_model"),
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer.json is missing, so prompts"),
        ("tokenizer_2", "tokenizer_2/tokenizer.json is missing, so prompts"),
        ("text_encoder_2/config.json", "is no text_encoder_2 of Kandinsky-5; give it with --text_encoder_2 DIR"),
    ),
)
def test_missing_parts_of_diffusers_layout(refused, as_diffusers, lost, message):
    place = as_diffusers / lost
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    matches(refused("--ckpt_dir", as_diffusers), message)


def test_parts_given_for_the_whole(refused, kandinsky_nano, kandinsky_diffusers):
    for folder, message in (
        (
            kandinsky_nano / "model",
            "model holds a transformer of Kandinsky-5 as model/ .*; give the folder above it, or",
        ),
        (
            kandinsky_nano / "vae",
            "vae is the AutoencoderKLHunyuanVideo of a checkpoint alone; give the folder above it",
        ),
        (
            kandinsky_diffusers / "transformer",
            "is the Kandinsky5Transformer3DModel of a checkpoint alone; give the fold",
        ),
        (kandinsky_nano.parent, f"is the folder above a checkpoint; give {kandinsky_nano}"),
    ):
        matches(refused("--ckpt_dir", folder), message)


def test_pipelines_of_pictures(refused, as_diffusers):
    change(as_diffusers / "model_index.json", _class_name="Kandinsky5T2IPipeline")
    matches(refused("--ckpt_dir", as_diffusers), "is a Kandinsky5T2IPipeline, which makes pictures; only Kandinsky-5")


@pytest.mark.parametrize("file", WEIGHTS)
def test_damaged_files(copied, file):
    whole = (copied / file).read_bytes()
    for damaged in (b"", whole[:7], whole[: len(whole) // 2], whole[:-64], b"<html>404: not found</html>" * 40):
        (copied / file).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{Path(file).name} is truncated or corrupt .*; download it again"):
            wan.from_pretrained(copied)


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize(
    "edit, message",
    (
        (lambda tensors, inner: tensors.pop(inner), "'{own}' is missing; download it again"),
        (lambda tensors, inner: tensors.update(extra=torch.ones(1)), "tensor 'extra' does not belong to this model"),
        (lambda tensors, inner: tensors.update({inner: torch.ones(3)}), r"tensor '{inner}' is \(3,\), but must be \("),
        (
            lambda tensors, inner: tensors.update({inner: tensors[inner].to(torch.int8)}),
            "tensor '{inner}' is torch.int8; only float32, bfloat16 or float16 is read",
        ),
    ),
)
def test_missing_extra_and_misshapen_tensors(
    copied, file, edit: Callable[[dict[str, Tensor], str], object], message: str
):
    tensors, inner = load_file(copied / file), INNER[file]
    edit(tensors, inner)
    save_file(tensors, copied / file)
    # What is missing is called as the model does.
    names = {"inner": inner, "own": inner.removeprefix("model.").removeprefix("text_model.")}
    with pytest.raises(CheckpointError, match=f"{copied}.*{message.format(**names)}"):
        wan.from_pretrained(copied)


@pytest.mark.parametrize(
    "file, said, message",
    (
        ("transformer", {"model_dim": 256}, "model_dim is 256, but its tensors are of 128"),
        ("transformer", {"num_visual_blocks": 10**9}, "num_visual_blocks is 1000000000, but its tensors are of 3"),
        ("transformer", {"axes_dims": [4, 4, 4]}, r"axes_dims is \[4, 4, 4\], but its tensors are of \[8, 12, 12\]"),
        ("transformer", {"visual_cond": False}, "visual_cond is False, but its tensors are of True"),
        ("transformer", {"attention_P": "x"}, "attention_P 'x' and .* are no NABLA's"),
        ("transformer", {"attention_wH": 0}, r"\[11, 0, 3\] are no NABLA's"),
        ("vae", {"latent_channels": 4}, "is .*, but must be"),
        ("vae", {"layers_per_block": 10**9}, "layers_per_block is 1000000000, but can be at most"),
        ("text_encoder", {"vocab_size": 100}, r"model.embed_tokens.weight' is \(1024, 64\), but must be \(100, 64\)"),
        ("text_encoder", {"num_hidden_layers": 3}, "num_hidden_layers is 3, but its files hold 2"),
        ("text_encoder", {"model_type": "llama"}, "model_type is 'llama', but must be 'qwen2_5_vl'"),
        ("text_encoder_2", {"model_type": "bert"}, "model_type is 'bert', but must be 'clip'"),
    ),
)
def test_configurations_that_contradict_their_tensors(as_diffusers, file, said, message):
    change(as_diffusers / file / "config.json", **said)
    with pytest.raises(CheckpointError, match=message) as raised:
        wan.from_pretrained(as_diffusers)
    assert "\n" not in str(raised.value)


def test_checkpoints_of_another_kind_than_the_config(refused, random_nano, kandinsky_nano):
    another = "; name another with --ckpt_dir, or a --config for it"
    said = refused("--config", T2V, "--ckpt_dir", random_nano)
    assert said == f"the settings are for kandinsky5-lite-t2v and checkpoint {random_nano} is t2v{another}"
    said = refused("--config", I2V, "--ckpt_dir", kandinsky_nano)
    assert said.endswith(f"is kandinsky5-lite-t2v or kandinsky5-pro-t2v{another}")


@pytest.mark.parametrize("size, other", (("lite", "pro"), ("pro", "lite")))
def test_sizes_tell_the_kind_whatever_the_name(size, other):
    width, layers = SIZES[size]
    config = {"model_dim": width, "num_visual_blocks": layers, "published_as": f"kandinsky5{other}_t2v_sft_5s"}
    checkpoint = Checkpoint("mine", Path("mine"), True, config, KANDINSKY)
    checkpoint.check_kind(f"kandinsky5-{size}-t2v")
    for kind in (f"kandinsky5-{other}-t2v", f"kandinsky5-{size}-i2v"):
        with pytest.raises(CheckpointError, match=f"for {kind} and checkpoint mine is kandinsky5-{size}-t2v; name"):
            checkpoint.check_kind(kind)


def test_pictures_that_are_none_or_not_asked_for(refused, kandinsky_nano, kandinsky_diffusers, tmp_path):
    picture = tmp_path / "first.png"
    Image.new("RGB", (64, 48)).save(picture)
    (tmp_path / "text.png").write_text("no picture")
    for given, message in (
        (tmp_path / "text.png", "text.png is no picture that can be read; give a .png, .jpg or .webp"),
        (tmp_path / "none.png", r"none.png cannot be read \(No such file or directory\); give a .png"),
        (tmp_path, "is a folder; give a .png"),
    ):
        matches(refused("--config", I2V, "--ckpt_dir", kandinsky_diffusers, "--image", given), message)
    said = refused("--config", I2V, "--ckpt_dir", kandinsky_diffusers)
    assert said == "videos of kandinsky5-pro-i2v begin with a picture; give one with --image FILE"
    for flags, what in ((("--config", T2V), "kandinsky5-lite-t2v"), ((), kandinsky_nano)):
        said = refused(*flags, "--ckpt_dir", kandinsky_nano, "--image", picture)
        assert said == f"image {picture} is not taken by {what}, which starts from text alone; leave it out"


def test_sizes_and_lengths_that_cannot_be(refused, kandinsky_nano):
    for flags, message in (
        (("--size", "100*64"), "size 100*64: both must be positive multiples of 16; the nearest below is 96*64"),
        (("--frame_num", "6", "--save_file", "out.mp4"), "frame_num 6 is not of the form 4n+1; use 5 or 9"),
        (
            ("--frame_num", "513", "--save_file", "out.mp4"),
            "513 frames of 128*64 are too many; at most 509 of 2048*2048",
        ),
        (("--size", "64*2064"), "1 frames of 64*2064 are too many; at most 509 of 2048*2048"),
    ):
        assert refused("--ckpt_dir", kandinsky_nano, *flags) == message


def test_files_of_other_transformers(refused, random_nano, kandinsky_nano, kandinsky_diffusers):
    own, other = kandinsky_nano / TRANSFORMER, next(random_nano.glob("*.safetensors"))
    for folder in (kandinsky_nano, kandinsky_diffusers):
        said = refused("--ckpt_dir", folder, "--transformer", other)
        matches(said, f"{other} is not a transformer of Kandinsky-5: it has no visual_")
    said = refused("--ckpt_dir", random_nano, "--transformer", own)
    other = "it has no patch_embedding.weight; give the file of one, and a LoRA as --lora"
    assert said == f"{own} is not a transformer of Wan: {other}"


def test_gguf_is_not_read(kandinsky_nano, kandinsky_diffusers, tmp_path):
    file = tmp_path / "k.gguf"
    file.write_bytes(b"GGUF")
    for folder in (kandinsky_nano, kandinsky_diffusers):
        with pytest.raises(
            InputError, match="gguf: gguf is not supported for Kandinsky-5; give one that ends in .safe"
        ):
            wan.from_pretrained(folder, transformer=file)
    with pytest.raises(InputError, match="^gguf is not supported for Kandinsky-5; leave it out$"):
        KANDINSKY.require(gguf=True)


@pytest.mark.parametrize("layout", ("published", "diffusers"))
def test_no_layout_is_converted(kandinsky_nano, kandinsky_diffusers, tmp_path, capsys, layout):
    source = kandinsky_nano if layout == "diffusers" else kandinsky_diffusers
    out = tmp_path / "out"
    assert convert_checkpoint.main(["--ckpt_dir", str(source), "--layout", layout, "--out", str(out)]) == 2
    said = f"error: {source} is of Kandinsky-5, which is not converted and need not be: either layout is read as it is"
    assert capsys.readouterr().err.startswith(said) and not out.exists()


def change(file: Path, **said: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | said))


def matches(said: str, message: str) -> None:
    assert re.search(message, said), said
