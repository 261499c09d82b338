"""Tokens of a transformer split over processes: what does not need several to be seen."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from diffusers import WanAnimateTransformer3DModel, WanTransformer3DModel
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import wan
from nabla import InputError, NablaConfig
from wan.models.wan.processor import ANIMATE_TRANSFORMER, TRANSFORMER
from wan.parallel.sequence_parallel import apply_sequence_parallel


@pytest.fixture
def mesh() -> DeviceMesh:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@torch.no_grad()
def test_what_a_forward_that_failed_has_asked_for_serves_no_other(mesh):
    sizes = dict(num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2)
    transformer = WanTransformer3DModel(in_channels=16, out_channels=16, **sizes).eval()
    apply_sequence_parallel(transformer, mesh, TRANSFORMER)
    wan.apply_attention(transformer, NablaConfig(threshold=0.4, tile=(1, 4, 4), pool=(1, 2, 2)))
    inputs = torch.randn(1, 16, 3, 12, 10), torch.tensor([500.0]), torch.randn(1, 512, 32)
    fail = transformer.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        transformer(*inputs)
    fail.remove()
    wan.remove_attention(transformer)
    with pytest.raises(InputError, match="use apply_attention"):
        transformer(*inputs)


def test_a_transformer_that_takes_tokens_by_their_frame_between_blocks_is_not_split(mesh):
    with torch.device("meta"):
        transformer = WanAnimateTransformer3DModel(num_attention_heads=2, attention_head_dim=12, num_layers=2)
    with pytest.raises(InputError, match="WanAnimateTransformer3DModel cannot be split .*leave it whole$"):
        apply_sequence_parallel(transformer, mesh, ANIMATE_TRANSFORMER)
