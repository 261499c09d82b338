"""Prints in which order a compiled block, of two processes, sends (s), waits (w) and attends (a)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from nabla import NablaConfig
from wan.attention.compile import compile_blocks
from wan.models.attention import apply_attention
from wan.models.wan.processor import TRANSFORMER
from wan.parallel.sequence_parallel import apply_sequence_parallel

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
transformer = WanTransformer3DModel(num_attention_heads=4, num_layers=1, ffn_dim=64, text_dim=32)
compile_blocks(transformer.blocks)
apply_sequence_parallel(transformer, init_device_mesh("cpu", (2,)), TRANSFORMER)
apply_attention(transformer, NablaConfig(keep=0.5))
inputs = torch.randn(1, 16, 2, 16, 16), torch.tensor([500.0]), torch.randn(1, 8, 32)
with torch.no_grad():
    _, (code,) = run_and_get_code(transformer, *inputs)
attention = {"gather": "a", "_scaled_dot_product_flash_attention_for_cpu": "a"}
calls = {"all_to_all_single": "s", "wait_tensor": "w"} | attention
print("".join(calls[name] for name in re.findall(rf"torch\.ops\.\w+\.({'|'.join(calls)})\.default\(", code)))
