"""Streamed blocks compute what the model computes, quantised or not."""

from __future__ import annotations

import copy
import json

import imageio.v3 as imageio
import pytest
import torch
import weight_files
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file

import generate
from nabla import NablaConfig
from wan.attention.compile import compile_blocks
from wan.caches.apply import apply_cache
from wan.caches.ran import blocks_left_out
from wan.checkpoints.lora import read_lora
from wan.config.cache_settings import CacheSettings
from wan.config.model_settings import LoraFile
from wan.memory import planning
from wan.memory.estimates import GIB
from wan.memory.placement import on_device
from wan.memory.planner import MemoryBudget
from wan.memory.streaming import stream_blocks
from wan.memory.weigh import weights_of
from wan.models.attention import apply_attention
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.names import NAMING
from wan.models.wan.processor import TRANSFORMER
from wan.models.wan.random_checkpoint import random_transformer
from wan.quantize.gguf import GGUF
from wan.quantize.quantizer import Quantizer
from wan.run import run

CPU = torch.device("cpu")


@pytest.fixture
def transformer():
    return random_transformer("nano", torch.float32, CPU, layers=5)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 2, 8, 8, generator=generator), torch.randn(1, 512, 64, generator=generator)
    return latents, torch.tensor([500]), text


def forward(transformer, inputs):
    with torch.no_grad():
        return transformer(*inputs, return_dict=False)[0]


@pytest.mark.parametrize("kept", (0, 1, 3, 4, 5))
def test_streamed_blocks_give_what_diffusers_group_offloading_gives(transformer, inputs, kept):
    plain, offloaded = forward(transformer, inputs), copy.deepcopy(transformer)
    apply_group_offloading(offloaded, CPU, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(forward(offloaded, inputs), plain)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    stream_blocks(transformer, transformer.blocks, CPU, kept)
    for _ in range(2):
        with on_device(transformer, CPU, offload=True):
            assert torch.equal(forward(transformer, inputs), plain)
            assert torch.equal(forward(transformer, inputs), plain)
        assert not transformer.block_stream.buffers and not transformer.block_stream.whole
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())


def test_two_blocks_are_there_at_a_time_and_all_go_back_after_an_error(transformer, inputs, monkeypatch):
    stream, seen = stream_blocks(transformer, transformer.blocks, CPU), []
    places = [{leaf.view(memory).data_ptr() for leaf in stream.leaves[n]} for n, memory in enumerate(stream.host)]
    weight = transformer.blocks[2].ffn.net[2].weight
    assert weight.data_ptr() in places[2]
    transformer.blocks[2].register_forward_pre_hook(lambda *_: seen.append(weight.data_ptr() in places[2]))
    with stream.opened():
        forward(transformer, inputs)
        assert seen == [False] and len(stream.buffers) == 2 and weight.data_ptr() in places[2]
    monkeypatch.setattr(transformer.blocks[2].ffn, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError), stream.opened():
        forward(transformer, inputs)
    assert weight.data_ptr() in places[2] and not stream.buffers


def test_it_does_not_run_closed(transformer, inputs):
    stream_blocks(transformer, transformer.blocks, CPU)
    with pytest.raises(RuntimeError, match="within block_stream.opened"):
        forward(transformer, inputs)


def test_compiled_sparse_blocks_stay_one_graph(transformer, inputs):
    apply_attention(transformer, NablaConfig(keep=0.5, backend="reference"))
    compile_blocks(transformer.blocks)
    plain = forward(transformer, inputs)
    stream_blocks(transformer, transformer.blocks, CPU, kept=1)
    with transformer.block_stream.opened(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(forward(transformer, inputs), plain)


@pytest.mark.parametrize("packing, error", (("int8", 0.02), ("int4", 0.2)))
def test_packed_blocks_stream_and_follow_their_weights(transformer, inputs, packing, error):
    pytest.importorskip("torchao")
    plain, quantizer = forward(transformer, inputs), Quantizer(transformer, transformer.blocks, packing, CPU, CPU)
    plain_size = sum(parameter.numel() * 4 for parameter in transformer.blocks[0].parameters())
    state = {name: quantizer(name, tensor) for name, tensor in transformer.state_dict().items()}
    transformer.load_state_dict(state, assign=True)
    assert len(quantizer.errors) == len(quantizer.layers) == 10 * 5 and max(quantizer.errors) < error
    assert f"50 linear layers in {packing}, outputs off by" in quantizer.describe()
    packed = forward(transformer, inputs)
    assert 0 < (packed - plain).norm() / plain.norm() < error
    stream = stream_blocks(transformer, transformer.blocks, CPU, kept=1)
    with stream.opened():
        assert torch.equal(forward(transformer, inputs), packed)
    assert 3 * stream.sizes[0] < plain_size


@pytest.mark.parametrize("kept", (0, 1, 2))
@pytest.mark.parametrize("cache", ("first_block", "mag", "taylorseer"))
def test_blocks_that_a_step_cache_leaves_out_are_not_transferred(transformer, inputs, monkeypatch, cache, kept):
    limits = {"interval": 3} if cache == "taylorseer" else {"threshold": 1e6, "max_skips": 2}
    settings = CacheSettings(cache, warmup=0, ratios=(1.0,) * 8 if cache == "mag" else None, **limits)
    order = []

    def video(model):
        cache = apply_cache(model, settings, TRANSFORMER)
        cache.begin(8, 0)
        results, transfers = [], []
        for step in range(8):
            order.clear()
            with cache.branch("prompt", step):
                results.append(forward(model, inputs))
            transfers.append(len(order))
        return results, transfers, cache.reused

    exact, _, reused = video(copy.deepcopy(transformer))
    stream = stream_blocks(transformer, transformer.blocks, CPU, kept, left_out=blocks_left_out)
    fetch = stream._fetch
    monkeypatch.setattr(stream, "_fetch", lambda number, slot: (order.append(number), fetch(number, slot)))
    with stream.opened():
        streamed, transfers, _ = video(transformer)
    assert all(torch.equal(a, b) for a, b in zip(streamed, exact)) and reused == 5
    # Of the forwards that reuse, the first of a row may have asked for one block before that was decided.
    first, computed = 0 if kept else 1, (0, 2, 5) if cache == "taylorseer" else (0, 3, 6)
    rest = [n for n in range(8) if n not in computed]
    assert [transfers[n] for n in rest] == [first if n - 1 in computed else 0 for n in rest]
    assert transfers[0] > 0 and transfers[computed[1]] == transfers[computed[2]] > 0


@pytest.fixture
def packed(random_nano, tmp_path):
    """A transformer's part of GGUF, and a LoRA for it."""
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-gguf.txt")
    state = load_file(next(random_nano.glob("*.safetensors")))
    weight_files.write_gguf(tmp_path / "a.gguf", state)
    part = components.transformer_component(Checkpoint.open(random_nano), tmp_path / "a.gguf")
    lora = LoraFile(str(weight_files.write_lora(tmp_path / "a.safetensors", weight_files.draw_factors(part.model))))
    return part, lora


def test_a_gguf_file_and_a_lora_beside_it_are_counted_and_streamed_as_they_are(packed, inputs):
    part, lora = packed
    for files in ((), (lora,)):
        expected = weights_of(part, part.model.blocks, torch.float32, files)
        adapters = [read_lora(file, part.model, NAMING) for file in files]
        model = components.load_transformer(part, torch.float32, CPU, adapters=adapters)
        plain = forward(model, inputs)
        sizes = stream_blocks(model, model.blocks, CPU, pinned=False).sizes
        assert max(sizes) == pytest.approx(expected.block(GGUF.key), rel=0.02)
        assert max(sizes) < 0.6 * expected.block(None) or files
        with on_device(model, CPU, offload=True):
            assert torch.equal(forward(model, inputs), plain)


def test_a_gguf_file_and_a_lora_run_within_memory_as_without_it(packed, random_nano, tmp_path, monkeypatch, capsys):
    part, lora = packed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "check_memory", lambda *_: None)
    gpu = 0
    monkeypatch.setattr(planning, "budget_of", lambda *_: MemoryBudget(gpu, 8 * GIB, 16 * GIB))
    monkeypatch.setattr(planning, "limit", lambda *_: None)
    flags = ["--prompt", "a cat", "--ckpt_dir", str(random_nano), "--device", "cpu", "--save_file", "out.mp4"]
    flags += "--size 64*48 --frame_num 5 --sample_steps 2 --base_seed 1 --transformer a.gguf".split()
    flags += ["--lora", lora.file]
    assert generate.main([*flags, "--memory", "24"]) == 2
    gpu = int(float(capsys.readouterr().err.split("free; ")[1].split(" GB")[0]) * 1e9)
    assert generate.main([*flags, "--memory", "24"]) == 0
    said = capsys.readouterr().err
    assert "memory: transformer gguf, " in said and "layers, beside the weights" in said
    planned = imageio.imread("out.mp4")
    assert json.loads((tmp_path / "out.json").read_text())["made_with"]["plan"]["packing"] == GGUF.key
    assert generate.main([*flags, "--config", "out.json"]) == 0 and (imageio.imread("out.mp4") == planned).all()
    assert "will differ" not in capsys.readouterr().err
    assert generate.main([*flags, "--memory", "24", "--fp8", "--dtype", "bfloat16"]) == 2
