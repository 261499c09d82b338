"""Models are on a device while they work, and where they were, without a copy, when they are done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wan.memory.placement import on_device

CPU = torch.device("cpu")


def test_what_was_on_a_device_is_again_where_it_was_without_a_copy():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[0].bias = model[1].bias
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: (weight.data_ptr(), weight.detach().clone()) for name, weight in before.items()}
    with pytest.raises(RuntimeError, match="out of memory"), on_device(model, torch.device("meta"), offload=True):
        assert all(weight.is_meta for weight in model.parameters())
        raise RuntimeError("out of memory")
    for name, weight in model.named_parameters(remove_duplicate=False):
        assert weight is before[name] and weight.data_ptr() == values[name][0] and torch.equal(weight, values[name][1])


def test_what_was_converted_on_a_device_stays_so():
    model = nn.Linear(4, 4)
    with on_device(model, CPU, offload=True):
        model.bias.data = model.bias.data.to(torch.float64)
        kept = model.bias.detach().clone()
    assert model.weight.dtype == torch.float32 and torch.equal(model.bias, kept)
