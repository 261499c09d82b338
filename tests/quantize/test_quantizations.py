"""Quantisations weigh what the table says, and say what they do not take and where they cannot run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nabla import InputError
from wan.memory.streaming import stream_blocks
from wan.models.kandinsky.random_checkpoint import random_transformer as random_kandinsky
from wan.models.wan.random_checkpoint import random_transformer
from wan.quantize.float8 import FLOAT8
from wan.quantize.int4 import INT4
from wan.quantize.quantizer import check_quantization, make_quantizer, quantize_layers
from wan.quantize.table import QUANTIZATIONS

CPU = torch.device("cpu")


@pytest.mark.parametrize("key", ("int8", "int4"))
def test_a_weight_takes_the_bytes_that_plans_reckon_with(key):
    pytest.importorskip("torchao")
    layer = nn.Linear(1536, 1024, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    count = layer.weight.numel()
    model = nn.ModuleDict({"blocks": nn.ModuleList([layer])})
    assert " linear layers in " in quantize_layers(model, model["blocks"], key, CPU)
    expected = QUANTIZATIONS[key].bytes_per_weight * count
    assert 0.95 * expected < stream_blocks(model, model["blocks"], CPU).sizes[0] <= expected


def test_what_is_chosen_without_being_asked_for_is_less_exact_at_a_cost():
    assert [key for key, one in QUANTIZATIONS.items() if one.cost is not None] == ["int8", "int4"]
    assert [key for key, one in QUANTIZATIONS.items() if one.text_cost is not None] == ["int8"]
    assert all(one.key == key for key, one in QUANTIZATIONS.items())


def test_nothing_is_quantised_unless_it_is_asked_for_or_where_a_file_has_done_so():
    transformer = random_transformer("nano", torch.bfloat16, CPU)
    for key in (None, "gguf"):
        assert make_quantizer(transformer, transformer.blocks, key, CPU, CPU) is None
        check_quantization(key, CPU, torch.float32)


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("wan.quantize.by_torchao.importlib.util.find_spec", lambda _: None)
    for key in ("int8", "int4"):
        with pytest.raises(InputError, match=f"{key} weights need torchao, .* pip install -r requirements-fp8.txt"):
            check_quantization(key, CPU, torch.bfloat16)


def test_float8_says_where_it_cannot_run():
    with pytest.raises(InputError, match="fp8 works in bfloat16 only, not in float16"):
        check_quantization("fp8", torch.device("cuda"), torch.float16)
    with pytest.raises(InputError, match="fp8 does not work on cpu: it needs an NVIDIA GPU of compute capability 8.9"):
        check_quantization("fp8", CPU, torch.bfloat16)


def test_float8_takes_the_linear_layers_of_the_blocks_but_none_with_a_row_of_zeros():
    transformer = random_transformer("nano", torch.bfloat16, CPU)
    weights = [module.weight for module in transformer.blocks.modules() if isinstance(module, nn.Linear)]
    assert len(weights) == 10 * len(transformer.blocks) and all(map(FLOAT8.takes, weights))
    assert not FLOAT8.takes(weights[0][:24]) and not FLOAT8.takes(weights[0][:, :24])
    weights[0][3] = 0
    assert [FLOAT8.takes(weight) for weight in weights] == [False, *[True] * (len(weights) - 1)]


def test_layers_of_parts_that_stay_in_float32_are_left():
    transformer = random_kandinsky("kandinsky5-nano", torch.bfloat16, CPU)
    blocks, kept = transformer.visual_transformer_blocks, transformer._keep_in_fp32_modules
    quantizer = make_quantizer(transformer, blocks, "int8", CPU, CPU, kept)
    assert len(quantizer.layers) == 10 * len(blocks) and not any("modulation" in name for name in quantizer.layers)
    modulation = blocks[0].visual_modulation.out_layer.weight
    name = "visual_transformer_blocks.0.visual_modulation.out_layer.weight"
    assert quantizer(name, modulation) is modulation and modulation.dtype == torch.float32


def test_4_bits_take_whole_groups_but_none_of_zeros():
    weight = torch.ones(256, 128)
    assert INT4.takes(weight) and not INT4.takes(weight[:255])
    weight[7, 64:] = 0
    assert not INT4.takes(weight)


def test_float8_without_a_layer_that_fits_is_an_error():
    transformer = random_transformer("nano", torch.bfloat16, CPU)
    for module in transformer.blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data[:, :24]
    with pytest.raises(InputError, match="fp8 takes none of these linear layers: sizes must be multiples of 16; leave"):
        quantize_layers(transformer, transformer.blocks, "fp8", CPU)
