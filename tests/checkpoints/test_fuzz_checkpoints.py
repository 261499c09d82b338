"""Damaged headers, indexes and configurations by the hundred: each is read, or refused in one line within a second."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import time

import pytest
import torch
import weight_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nabla import InputError
from wan.checkpoints.lora import read_lora
from wan.checkpoints.single_file import open_transformer
from wan.config.model_settings import LoraFile
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.convert import convert
from wan.models.wan.names import NAMING

ODD = (
    None,
    True,
    -1,
    0,
    1,
    3,
    7,
    10**9,
    10**30,
    2**63,
    1e30,
    0.5,
    "",
    "x",
    "3",
    "\x1b[2J\n",
    "n" * 300,
    "../x",
    [],
    [1],
    [0, -1],
    [10**9, 10**9],
    ["a"] * 9,
    {},
    {"a": 1},
    [[[[[]]]]],
    "F4",
    "F6_E2M3",
    "F8_E8M0",
    "I8",
    "U8",
    "F16",
    "BOOL",
)
NAMES = (
    "num_hidden_layers",
    "num_labels",
    "quantization_config",
    "blocks.999999999.self_attn.q.weight",
    "blocks.0.ffn.0.weight_scale",
    "blocks.0.ffn.0.comfy_quant",
    "blocks.0.ffn.0.alpha",
    "__metadata__",
    "a" * 300,
    "dtype",
    "return_dict",
    "transformer_2",
)
SECOND = 1.0
# As they were.
CONFIGS: dict[str, str] = {}


def few(count: int):
    """Settings of a test of so many examples, the same ones always."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


@st.composite
def damage(draw, content):
    """Content of JSON with some of its values replaced, removed or added."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while True:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.integers(0, 4)):
                place = place[key]
                continue
            act = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
            if act == "remove":
                place.pop(key)
            elif act == "replace" or isinstance(place, list):
                place[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
            else:
                place[draw(st.sampled_from(NAMES))] = copy.deepcopy(draw(st.sampled_from((*ODD, place[key]))))
            break
    return content


@st.composite
def flips(draw, content: bytes, most: int):
    """Bytes with some changed, or cut."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 8))):
        content[draw(st.integers(0, min(most, len(content)) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from((len(content), len(content), draw(st.integers(0, len(content))))))])


def only_a_line(act) -> None:
    """Run something, which may raise one line and nothing else, and needs less than a second."""
    began = time.process_time()
    try:
        act()
    except InputError as error:
        assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 3000
    assert time.process_time() - began < SECOND


def header_of(file) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_header(file, header, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture(scope="module")
def folders(random_nano, tmp_path_factory):
    """A checkpoint in each layout, to damage a file of and mend it again."""
    root = tmp_path_factory.mktemp("fuzzed")
    shutil.copytree(random_nano, root / "published")
    convert(Checkpoint.open(random_nano), root / "diffusers", "diffusers")
    return root


@pytest.fixture
def whole(folders):
    """The folders, every file of which is as it was after the test."""
    kept = {file: file.read_bytes() for file in folders.rglob("*.json")}
    kept |= {file: file.read_bytes() for file in folders.glob("*/*.safetensors")}
    yield folders
    for file, content in kept.items():
        file.write_bytes(content)
    (folders / "diffusers" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def checkpoint(random_nano):
    return Checkpoint.open(random_nano)


@pytest.fixture(scope="module")
def model(checkpoint):
    return components.transformer_component(checkpoint).model


def opened(folder) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.resolve({"prompt": "x"})
    components.load_transformer(components.transformer_component(checkpoint), torch.float32, "cpu")


@few(220)
@given(data=st.data())
def test_headers_of_safetensors(checkpoint, tmp_path, random_nano, data):
    header, tensors = header_of(next(random_nano.glob("*.safetensors")))
    file = tmp_path / "a.safetensors"
    write_header(file, data.draw(damage(header)), tensors)
    only_a_line(
        lambda: components.load_transformer(components.transformer_component(checkpoint, file), torch.float32, "cpu")
    )


@few(120)
@given(data=st.data())
def test_bytes_of_safetensors(checkpoint, tmp_path, random_nano, data):
    raw = next(random_nano.glob("*.safetensors")).read_bytes()
    file = tmp_path / "a.safetensors"
    file.write_bytes(data.draw(flips(raw, 8000)))
    only_a_line(lambda: components.transformer_component(checkpoint, file))


@few(150)
@given(data=st.data())
def test_headers_of_lora(model, tmp_path_factory, data):
    factors = dict(list(weight_files.draw_factors(model).items())[:4])
    file = tmp_path_factory.getbasetemp() / "lora.safetensors"
    header, tensors = header_of(weight_files.write_lora(file, factors, "musubi"))
    header["__metadata__"] = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": 3})}
    header = data.draw(damage(header))
    said = data.draw(damage({"transformer.lora_alpha": 6, "transformer.alpha_pattern": {"ffn": 2}}))
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["lora_adapter_metadata"] = json.dumps(said)
    write_header(file, header, tensors)
    only_a_line(lambda: read_lora(LoraFile(str(file)), model, NAMING))


@few(150)
@given(data=st.data())
def test_headers_of_gguf(tmp_path_factory, random_nano, data):
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-gguf.txt")
    file = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    if not file.exists():
        weight_files.write_gguf(file, load_file(next(random_nano.glob("*.safetensors"))))
    damaged = file.with_name("damaged.gguf")
    damaged.write_bytes(data.draw(flips(file.read_bytes(), data.draw(st.sampled_from((64, 512, 4000))))))
    only_a_line(lambda: open_transformer(damaged, NAMING))


@few(60)
@given(data=st.data())
def test_indexes(whole, data):
    folder = whole / "diffusers" / "transformer"
    listed = {name: "diffusion_pytorch_model.safetensors" for name in ("proj_out.bias", "proj_out.weight")}
    index = {"metadata": {"total_size": 3}, "weight_map": listed}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(data.draw(damage(index))))
    only_a_line(lambda: components.transformer_component(Checkpoint.open(whole / "diffusers")))


@pytest.mark.parametrize("file", ("published/config.json", "diffusers/transformer/config.json"))
@few(80)
@given(data=st.data())
def test_configurations_of_the_transformer(whole, random_nano, file, data):
    text = CONFIGS.setdefault(file, (whole / file).read_text())
    (whole / file).write_text(json.dumps(data.draw(damage(json.loads(text)))))
    only_a_line(lambda: opened(whole / file.split("/")[0]))


@few(60)
@given(data=st.data())
def test_configurations_of_the_vae(whole, data):
    file = whole / "diffusers" / "vae" / "config.json"
    text = CONFIGS.setdefault("vae", file.read_text())
    file.write_text(json.dumps(data.draw(damage(json.loads(text)))))
    only_a_line(lambda: components.vae_component(Checkpoint.open(whole / "diffusers")).load(torch.float32, "cpu"))


@few(80)
@given(data=st.data())
def test_configurations_of_the_text_encoder(whole, data):
    file = whole / "diffusers" / "text_encoder" / "config.json"
    text = CONFIGS.setdefault("text encoder", file.read_text())
    file.write_text(json.dumps(data.draw(damage(json.loads(text)))))

    def encode():
        part = components.text_encoder_component(Checkpoint.open(whole / "diffusers"), torch.float32)
        model = part.load(torch.float32, "cpu")
        assert model(torch.zeros(1, 4, dtype=torch.long)).last_hidden_state.shape[:2] == (1, 4)

    only_a_line(encode)


@few(60)
@given(data=st.data())
def test_indexes_of_the_pipeline_and_raw_text(whole, data):
    name = data.draw(st.sampled_from(("model_index.json", "transformer/config.json", "vae/config.json")))
    file = whole / "diffusers" / name
    text = CONFIGS.setdefault(name, file.read_text())
    file.write_bytes(data.draw(flips(text.encode(), 4000)))

    def open_both():
        checkpoint = Checkpoint.open(whole / "diffusers")
        components.transformer_component(checkpoint)
        components.vae_component(checkpoint)

    only_a_line(open_both)
    file.write_text(text)
