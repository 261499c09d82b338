"""Attention by copies of the kept blocks: equal to the reference whatever rows keep, also in compiled callers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import relative_error
from torch._dynamo.testing import CompileCounter

import nabla
from nabla import InputError, NablaConfig, probe
from nabla.backends import gather, reference
from nabla.tiling import TileLayout

FULL, PARTIAL = (2, 16, 24), (2, 11, 18)
GATHER = NablaConfig(threshold=0.5, backend="gather")


def random_tiles(layout, batch, heads=3, dim=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = batch, layout.blocks * layout.block, heads, dim
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


def random_blocks(layout, batch, heads):
    """Of which rows keep one block to all, each count more than once."""
    generator = torch.Generator().manual_seed(1)
    score = torch.rand(batch, heads, layout.blocks, layout.blocks, generator=generator)
    count = torch.randint(1, layout.blocks + 1, (batch, heads, layout.blocks, 1), generator=generator)
    count[..., 0, :], count[..., 1, :] = 1, layout.blocks
    return score.argsort(dim=-1).argsort(dim=-1) < count


@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float64, 1e-14)))
@pytest.mark.parametrize("grid", (FULL, PARTIAL))
@pytest.mark.parametrize("batch, heads", ((2, 3), (1, 3), (2, 1), (1, 1)))
def test_equals_the_reference(dtype, bound, grid, batch, heads):
    layout = TileLayout.build(grid, GATHER.tile, "cpu")
    qkv, kept = random_tiles(layout, batch=2, dtype=dtype), random_blocks(layout, batch, heads)
    result = gather.attend(*qkv, gather.prepare(kept, layout))
    exact = reference.attend(*(x.double() for x in qkv), reference.prepare(kept, layout))
    assert result.dtype == dtype and relative_error(result.double(), exact) < bound
    assert torch.equal(gather.block_counts(gather.prepare(kept, layout)), kept.sum(-1))


@pytest.mark.parametrize("key_numbers, threads", ((1, 1), (1, 3), (2**30, 1)))
def test_however_many_blocks_are_taken_together(monkeypatch, key_numbers, threads):
    layout = TileLayout.build(PARTIAL, GATHER.tile, "cpu")
    qkv, kept = random_tiles(layout, batch=1), random_blocks(layout, 1, 3)
    monkeypatch.setattr(gather, "KEY_NUMBERS", key_numbers)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    exact = reference.attend(*qkv, reference.prepare(kept, layout))
    assert relative_error(gather.attend(*qkv, gather.prepare(kept, layout)), exact) < 1e-6


@pytest.mark.parametrize("backend", ("inductor", CompileCounter()))
def test_inside_a_compiled_caller(backend):
    layout = TileLayout.build(PARTIAL, GATHER.tile, "cpu")
    plan = nabla.plan(PARTIAL, GATHER, "cpu")
    qkv = [layout.to_raster(x) for x in random_tiles(layout, batch=2)]
    result = torch.compile(nabla.attend, backend=backend, fullgraph=True, dynamic=False)(*qkv, plan)
    exact = nabla.attention(*qkv, PARTIAL, replace(GATHER, backend="reference"))
    assert relative_error(result, exact) < 1e-6


def test_a_probe_hears_of_it():
    class Listening(probe.Probe):
        parts, seen = [], []

        def run(self, part, function, args, kwargs):
            self.parts.append(part)
            return function(*args, **kwargs)

        def see(self, counts, blocks):
            self.seen.append((counts(), blocks(torch.tensor([2, 0]))))

    layout = TileLayout.build(FULL, GATHER.tile, "cpu")
    kept = random_blocks(layout, 1, 3)
    with probe.listening(Listening()):
        gather.attend(*random_tiles(layout, batch=1), gather.prepare(kept, layout))
    ((counts, blocks),) = Listening.seen
    assert torch.equal(counts, kept.sum(-1)) and torch.equal(blocks, kept[:, [2, 0]])
    assert Listening.parts == [probe.ATTENTION]


def test_infers_but_does_not_train():
    auto = replace(GATHER, backend="auto")
    assert nabla.plan(PARTIAL, auto, "cpu").backend == "gather"
    assert nabla.plan(PARTIAL, auto, "cpu", trains=True).backend == "reference"
    with pytest.raises(InputError, match="gather does not work on cpu: has no backward; use backend: auto"):
        nabla.plan(PARTIAL, GATHER, "cpu", trains=True)
    layout = TileLayout.build(PARTIAL, GATHER.tile, "cpu")
    qkv = [layout.to_raster(x).detach().requires_grad_() for x in random_tiles(layout, batch=1)]
    with pytest.raises(InputError, match="this plan is for inference.*give trains=True to nabla.plan"):
        nabla.attend(*qkv, nabla.plan(PARTIAL, auto, "cpu"))
    found, wanted = (
        torch.autograd.grad(nabla.attention(*qkv, PARTIAL, config).sum(), qkv)
        for config in (auto, replace(GATHER, backend="reference"))
    )
    assert all(map(torch.equal, found, wanted)) and found[0].abs().sum() > 0


def test_is_for_cpus_alone():
    assert gather.unsupported_reason(torch.device("cuda", 0), 64) == "is for CPUs alone"
    assert gather.unsupported_reason(torch.device("cpu"), 64) == ""
