"""Means in place of dropped blocks, against the definition token by token."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nabla_attention import random_qkv
from test_pool import numbered
from torch._dynamo.testing import CompileCounter

import nabla
from nabla import InputError, NablaConfig, backends, probe
from nabla.attention import ReusableBlockMask
from nabla.backends import flex, reference
from nabla.block_lists import to_lists
from nabla.dropped import TileMeans, join_means, tile_means
from nabla.kernels.dropped_means import join_means_of_lists
from nabla.selection import block_means
from nabla.tiling import TileLayout

ALGORITHMS = ("nabla-0.5_dropped-mean", "keep-0.2_pool-1-4-4_dropped-mean", "dropped-mean_sta-3-1-3", "keep-0.3")
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 19))
MEAN = NablaConfig(keep=0.3, dropped="mean")


def oracle(q, k, v, grid, config):
    """Each query over the tokens of the blocks that it keeps, and over the mean of each other block so many times."""
    tile_of = numbered(grid, config.tile)
    tiles = sorted(set(tile_of))
    kept = nabla.select_blocks(q, k, grid, config)
    members = [[n for n, one in enumerate(tile_of) if one == tile] for tile in tiles]
    out = torch.empty_like(q)
    for batch, head in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[2])):
        qh, kh, vh = (x[batch, :, head] for x in (q, k, v))
        for row, tokens in enumerate(members):
            keys, values = [], []
            for tile, others in enumerate(members):
                if kept[batch, head, row, tile]:
                    keys, values = keys + [kh[others]], values + [vh[others]]
                elif config.dropped == "mean":
                    keys, values = (
                        all_of + [x[others].mean(0).expand(len(others), -1)] for all_of, x in ((keys, kh), (values, vh))
                    )
            scores = qh[tokens] @ torch.cat(keys).T / math.sqrt(q.shape[-1])
            out[batch, tokens, head] = scores.softmax(-1) @ torch.cat(values)
    return out


@settings(max_examples=20, deadline=None)
@given(
    grid=GRIDS,
    algorithm=st.sampled_from(ALGORITHMS),
    tile=st.sampled_from(((1, 8, 8), (1, 4, 8), (2, 4, 4))),
    backend=st.sampled_from(("reference", "gather")),
    seed=st.integers(0, 99),
)
def test_means_in_place_of_dropped_blocks_are_the_definition(grid, algorithm, tile, backend, seed):
    config = NablaConfig.parse(algorithm)
    if config.pool is None:
        config = replace(config, tile=tile)
    config = replace(config, backend=backend)
    qkv = random_qkv(grid, batch=2, seed=seed)
    torch.testing.assert_close(nabla.attention(*qkv, grid, config), oracle(*qkv, grid, config), atol=1e-10, rtol=1e-10)


@settings(max_examples=5, deadline=None)
@given(grid=GRIDS, algorithm=st.sampled_from(ALGORITHMS[:3]), seed=st.integers(0, 99))
def test_the_reference_has_their_gradients(grid, algorithm, seed):
    config = NablaConfig.parse(algorithm)
    given_qkv = [x.requires_grad_() for x in random_qkv(grid, seed=seed)]
    weight = random_qkv(grid, seed=seed + 1)[0]
    found = torch.autograd.grad((nabla.attention(*given_qkv, grid, config) * weight).sum(), given_qkv)
    wanted = torch.autograd.grad((oracle(*given_qkv, grid, config) * weight).sum(), given_qkv)
    for gradient, right in zip(found, wanted):
        torch.testing.assert_close(gradient, right, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("backend", ("reference", "gather"))
@pytest.mark.parametrize("grid", ((2, 11, 18), (1, 16, 24)))
def test_where_no_block_is_dropped_it_is_dense_attention(backend, grid):
    qkv = random_qkv(grid, dtype=torch.float32)
    dense = nabla.attention(*qkv, grid, NablaConfig())
    for rule in ({"threshold": 1}, {"keep": 1}):
        config = NablaConfig(**rule, dropped="mean", backend=backend)
        assert relative_error(nabla.attention(*qkv, grid, config), dense) < 1e-6


@pytest.mark.parametrize("backend", ("reference", "gather"))
@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)))
def test_it_is_right_in_all_dtypes_and_in_groups(monkeypatch, backend, dtype, bound):
    grid, config = (2, 11, 18), replace(MEAN, backend=backend)
    qkv = random_qkv(grid, batch=2, heads=3, dtype=dtype)
    whole = nabla.attention(*qkv, grid, config)
    exact = oracle(*(x.double() for x in qkv), grid, config)
    assert whole.dtype == dtype and relative_error(whole.double(), exact) < bound
    monkeypatch.setattr(sys.modules["nabla.attention"], "LIST_ENTRIES", 2 * 2 * 12**2)
    monkeypatch.setattr("nabla.backends.reference.TOKEN_PAIRS", 2 * 12 * 64**2)
    monkeypatch.setattr("nabla.backends.gather.KEY_NUMBERS", 1)
    assert relative_error(nabla.attention(*qkv, grid, config), whole) < bound


def joined_and_wanted(block=(1, 8, 8), dtype=torch.float32):
    """What the join is given of kept blocks, and the reference's attention with means."""
    grid = (2, 11, 18)
    layout = TileLayout.build(grid, block, "cpu")
    q, k, v = (layout.to_tiles(x) for x in random_qkv(grid, batch=2, heads=3, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(2, 3, layout.blocks, layout.blocks, generator=generator) < 0.3
    # One row keeps all, which leaves nothing to join, and every row one.
    kept[:, :, 1], kept[..., 0] = True, True
    mask = kept.repeat_interleave(layout.block, -2).repeat_interleave(layout.block, -1) & layout.valid.flatten()
    log_sums = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf).logsumexp(-1)
    out = reference.attend(q, k, v, reference.prepare(kept, layout))
    means = TileMeans(*(tile_means(x, block_means(x, layout), layout) for x in (k, v)), layout.sizes)
    return (q, out, log_sums, kept, means), reference.attend(q, k, v, reference.prepare(kept, layout), means)


def test_means_are_joined_by_the_logarithm_of_the_sum(monkeypatch):
    given, wanted = joined_and_wanted()
    assert relative_error(join_means(*given), wanted) < 1e-6 < 1e-2 < relative_error(given[1], wanted)
    monkeypatch.setattr("nabla.dropped.PAIRS", 1)
    assert relative_error(join_means(*given), wanted) < 1e-6


@pytest.mark.parametrize("parts", (1, 2))
def test_they_are_joined_to_what_lists_keep(parts):
    (q, out, log_sums, kept, means), wanted = joined_and_wanted()
    even = torch.arange(kept.shape[-1]) % 2 == 0
    lists = [to_lists(kept)] if parts == 1 else [to_lists(kept & even), to_lists(kept & ~even)]
    assert relative_error(join_means_of_lists(q, out.clone(), log_sums, lists, means), wanted) < 1e-6
    joined = torch.compile(join_means_of_lists, backend="aot_eager", fullgraph=True)
    assert relative_error(joined(q, out.clone(), log_sums, lists, means), wanted) < 1e-6


@pytest.mark.parametrize("pool", (None, (1, 4, 4), (1, 8, 2)))
def test_means_of_parts_make_those_of_tiles(pool):
    layout = TileLayout.build((2, 11, 18), (1, 8, 8), "cpu", pool)
    tiles = layout.to_tiles(random_qkv(layout.grid, dtype=torch.float32)[0])
    found = tile_means(tiles, block_means(tiles, layout), layout)
    exact = tile_means(tiles.double(), block_means(tiles, layout), layout)
    assert found.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-6)
    tokens = layout.to_raster(tiles)[0, [n for n, t in enumerate(numbered(layout.grid, layout.tile)) if t == (1, 1, 2)]]
    torch.testing.assert_close(found[0, :, -1], tokens.mean(0))


@pytest.mark.parametrize("algorithm", ("keep-0.3_dropped-mean", "dropped-mean_sta-1-3-1"))
@pytest.mark.parametrize("backend", ("inductor", CompileCounter()))
def test_inside_a_compiled_caller_it_is_one_graph(algorithm, backend):
    grid, config = (2, 11, 18), NablaConfig.parse(algorithm)
    qkv, plan = random_qkv(grid, dtype=torch.float32), nabla.plan(grid, config, "cpu")
    result = torch.compile(nabla.attend, backend=backend, fullgraph=True, dynamic=False)(*qkv, plan)
    assert relative_error(result, nabla.attend(*qkv, plan)) < 1e-6


def test_blocks_that_are_kept_for_later_steps_say_what_is_dropped():
    grid, plan = (2, 11, 18), nabla.plan((2, 11, 18), MEAN, "cpu")
    qkv, later = random_qkv(grid), random_qkv(grid, seed=1)
    mask = torch.zeros(1, 2, 12, 12, dtype=torch.bool)
    written = nabla.attend(*qkv, plan, block_mask=ReusableBlockMask(mask, reuse=False))
    assert torch.equal(written, nabla.attend(*qkv, plan))
    found = nabla.attend(*later, plan, block_mask=ReusableBlockMask(mask, reuse=True))
    layout = plan.selection.layout
    q, k, v = (layout.to_tiles(x) for x in later)
    means = TileMeans(*(tile_means(x, block_means(x, layout), layout) for x in (k, v)), layout.sizes)
    wanted = layout.to_raster(reference.attend(q, k, v, reference.prepare(mask, layout), means))
    assert relative_error(found, wanted) < 1e-12


def test_a_kernel_that_leaves_them_out_is_found_out_where_they_are_asked_for(monkeypatch):
    attend = backends.gather.attend
    monkeypatch.setattr(backends.gather, "attend", lambda q, k, v, blocks, means: attend(q, k, v, blocks))
    monkeypatch.setattr(backends, "_verified", {})
    assert nabla.plan((1, 8, 16), NablaConfig(keep=0.5), "cpu").backend == "gather"
    with pytest.warns(UserWarning, match="gather does not work on cpu .its result is off by"):
        assert nabla.plan((1, 8, 16), replace(MEAN), "cpu").backend == "reference"


def test_what_cannot_be_done_is_said_in_a_line(monkeypatch):
    with pytest.raises(InputError, match="flex does not work on cpu: gives no sums to join means to on cpu; use back"):
        nabla.plan((1, 8, 16), replace(MEAN, backend="flex"), "cpu")
    assert flex.dropped_unsupported_reason(torch.device("cuda")) == ""
    assert nabla.plan((1, 8, 16), MEAN, "cpu", trains=True).backend == "reference"
    monkeypatch.setattr(backends.gather, "backward_unsupported_reason", lambda *kind: "")
    monkeypatch.setattr(backends, "verify", lambda *kind: "")
    monkeypatch.setattr(
        backends, "_unsupported_reason", lambda backend, *kind: "" if backend is backends.gather else "no"
    )
    with pytest.raises(InputError, match="dropped 'mean' has no gradients on backend gather; train without it"):
        nabla.plan((1, 8, 16), MEAN, "cpu", trains=True)


def test_the_plan_and_a_probe_tell_of_it():
    class Parts(probe.Probe):
        heard = []

        def run(self, part, function, args, kwargs):
            self.heard.append(part)
            return function(*args, **kwargs)

    plan = nabla.plan((1, 8, 16), MEAN, "cpu")
    assert plan.describe().startswith("keep-0.3_dropped-mean, ")
    with probe.listening(Parts()):
        nabla.attend(*random_qkv((1, 8, 16)), plan)
    assert set(Parts.heard) == {probe.MASK, probe.ATTENTION}
