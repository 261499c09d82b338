"""Gradients of the operator: against plain masked attention in float64, and however the caller runs it."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import nabla
from nabla import NablaConfig
from nabla.attention import ReusableBlockMask
from nabla.rotary import Rotary, rotate
from nabla.tiling import TileLayout

PARTIAL = (2, 11, 18)
CONFIG = NablaConfig.parse("nabla-0.4_sta-1-1-3")


def random_qkv(grid, heads=2, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = 1, math.prod(grid), heads, dim
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def random_rotary(grid, dim=8):
    angles = torch.rand(1, math.prod(grid), 1, dim // 2, dtype=torch.float64).repeat_interleave(2, -1)
    return Rotary(angles.cos(), angles.sin())


def masked_attention(q, k, v, grid, config, rotary=None):
    """In raster order, by a mask of tokens that is made from the chosen blocks alone."""
    q, k = (x if rotary is None else rotate(x, rotary) for x in (q, k))
    layout = TileLayout.build(grid, config.tile, "cpu")
    block = layout.slot // layout.block
    mask = nabla.select_blocks(q.detach(), k.detach(), grid, config)[:, :, block][..., block]
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)


def gradients(function, qkv, weight):
    return torch.autograd.grad(function(*qkv), qkv, weight)


@settings(max_examples=10, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 20)),
    algorithm=st.sampled_from(("nabla-0.5", "keep-0.3", "sta-3-1-3", "nabla-0.3_sta-1-3-1")),
    rotates=st.booleans(),
    seed=st.integers(0, 100),
)
def test_equal_those_of_masked_attention(grid, algorithm, rotates, seed):
    config, rotary = NablaConfig.parse(algorithm), random_rotary(grid) if rotates else None
    qkv, weight = random_qkv(grid, seed=seed), random_qkv(grid, seed=seed + 1)[0].detach()
    plan = nabla.plan(grid, config, "cpu", trains=True)
    found = gradients(lambda *qkv: nabla.attend(*qkv, plan, rotary), qkv, weight)
    wanted = gradients(lambda *qkv: masked_attention(*qkv, grid, config, rotary), qkv, weight)
    for gradient, exact in zip(found, wanted):
        torch.testing.assert_close(gradient, exact, atol=1e-10, rtol=1e-10)


def test_in_a_compiled_caller():
    plan, rotary = nabla.plan(PARTIAL, CONFIG, "cpu", trains=True), random_rotary(PARTIAL)
    qkv, weight = random_qkv(PARTIAL), random_qkv(PARTIAL, seed=1)[0].detach()
    compiled = torch.compile(nabla.attend, backend="aot_eager", fullgraph=True, dynamic=False)
    found = gradients(lambda *qkv: compiled(*qkv, plan, rotary), qkv, weight)
    for gradient, exact in zip(found, gradients(lambda *qkv: nabla.attend(*qkv, plan, rotary), qkv, weight)):
        torch.testing.assert_close(gradient, exact, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("is_compiled", (False, True))
def test_under_checkpointing_the_same_blocks_are_chosen_again(is_compiled):
    plan = nabla.plan(PARTIAL, CONFIG, "cpu", trains=True)
    qkv, weight = random_qkv(PARTIAL), random_qkv(PARTIAL, seed=1)[0].detach()
    blocks = torch.zeros(1, 2, plan.selection.layout.blocks, plan.selection.layout.blocks, dtype=torch.bool)
    block_mask = ReusableBlockMask(blocks, reuse=False)
    attend = torch.compile(nabla.attend, fullgraph=True, dynamic=False) if is_compiled else nabla.attend
    out = checkpoint(lambda *qkv: attend(*qkv, plan, None, block_mask), *qkv, use_reentrant=False)
    chosen = blocks.clone()
    blocks.zero_()
    found = torch.autograd.grad(out, qkv, weight)
    assert torch.equal(blocks, chosen) and chosen.any()
    for gradient, exact in zip(found, gradients(lambda *qkv: nabla.attend(*qkv, plan), qkv, weight)):
        torch.testing.assert_close(gradient, exact, atol=1e-10, rtol=1e-10)


def test_under_autocast():
    qkv, weight = random_qkv(PARTIAL, dtype=torch.float32), random_qkv(PARTIAL, seed=1)[0].detach()
    exact = gradients(lambda *qkv: nabla.attention(*qkv, PARTIAL, CONFIG), qkv, weight.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lambda *qkv: nabla.attention(*qkv, PARTIAL, CONFIG), qkv, weight.bfloat16())
    for gradient, wanted in zip(found, exact):
        assert gradient.dtype == torch.float32 and relative_error(gradient, wanted) < 2e-2


def test_of_gradients_that_are_not_contiguous():
    qkv, weight = random_qkv(PARTIAL), random_qkv(PARTIAL, seed=1)[0].detach()
    plan = nabla.plan(PARTIAL, CONFIG, "cpu", trains=True)
    strided = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for given_weight in (strided, weight[:1, :1, :1, :1].expand(weight.shape)):
        found = gradients(lambda *qkv: nabla.attend(*qkv, plan), qkv, given_weight)
        wanted = gradients(lambda *qkv: nabla.attend(*qkv, plan), qkv, given_weight.contiguous())
        assert all(map(torch.equal, found, wanted))


def test_few_heads_at_a_time_give_the_same(monkeypatch):
    qkv, weight = random_qkv(PARTIAL, heads=3), random_qkv(PARTIAL, heads=3, seed=1)[0].detach()
    whole = gradients(lambda *qkv: nabla.attention(*qkv, PARTIAL, CONFIG), qkv, weight)
    monkeypatch.setattr(sys.modules["nabla.attention"], "LIST_ENTRIES", 1)
    apart = gradients(lambda *qkv: nabla.attention(*qkv, PARTIAL, CONFIG), qkv, weight)
    for gradient, exact in zip(apart, whole):
        torch.testing.assert_close(gradient, exact, atol=1e-12, rtol=1e-12)
