"""The operator against a token-level oracle, on grids that tiles divide and grids that they do not."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import nabla
from nabla import InputError, NablaConfig
from nabla.attention import ReusableBlockMask
from nabla.backends import BACKENDS, reference
from nabla.block_lists import from_lists, to_lists
from nabla.rotary import Rotary, rotate
from nabla.selection import blocks_to_keep, top_p_mask

ALGORITHMS = ("nabla-0.5", "nabla-0.9", "sta-3-1-3", "nabla-0.3_sta-1-3-1", "keep-0.3", "keep-0.2_sta-3-1-1")
POOLED = ("nabla-0.5_pool-1-4-4", "keep-0.3_pool-1-2-4", "nabla-0.9_min-0.2_max-0.4_pool-1-1-2_sta-1-3-1")


def random_qkv(grid, batch=1, heads=2, dim=8, seed=0, dtype=torch.float64, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, math.prod(grid), heads, dim
    return tuple(spread * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))


def oracle(q, k, v, grid, config):
    """Dense attention under a token mask, built token by token from the definition of the algorithm."""
    tile_of, part_of = (
        [tuple(p // t for p, t in zip(place, size)) for place in itertools.product(*map(range, grid))]
        for size in (config.tile, config.pool or config.tile)
    )
    tiles, parts = sorted(set(tile_of)), sorted(set(part_of))
    block_of = torch.tensor([tiles.index(one) for one in tile_of])
    n = len(tiles)
    part_members = [torch.tensor([token for token, one in enumerate(part_of) if one == part]) for part in parts]
    # (N, parts) bool, which parts each block has.
    owns = torch.stack([block_of[tokens[0]] == torch.arange(n) for tokens in part_members], dim=1)
    near = torch.zeros(n, n, dtype=torch.bool)
    if config.window is not None:
        for a, b in itertools.product(range(n), range(n)):
            near[a, b] = all(abs(x - y) <= w // 2 for x, y, w in zip(tiles[a], tiles[b], config.window))
    out = torch.empty_like(q)
    for batch, head in itertools.product(range(q.shape[0]), range(q.shape[2])):
        qh, kh, vh = (x[batch, :, head] for x in (q, k, v))
        kept = near.clone()
        if config.selects:
            means = [torch.stack([x[m].float().mean(0) for m in part_members]) for x in (qh, kh)]
            pairs = (means[0] @ means[1].T / math.sqrt(q.shape[-1])).softmax(-1)
            rows = torch.stack([(pairs @ owns.T.float())[own].mean(0) for own in owns])
            for row, probabilities in enumerate(rows):
                order = probabilities.argsort()
                if config.keep is not None:
                    count = next(m for m in range(1, n + 1) if m / n >= config.keep)
                    chosen = order[n - count :]
                else:
                    total = torch.cumsum(probabilities[order], 0)
                    limits = config.keep_min or 1e-9, config.keep_max or 1
                    least, most = (next(m for m in range(1, n + 1) if m / n >= limit) for limit in limits)
                    chosen = order[n - min(max(int((total >= 1 - config.threshold).sum()), least), most) :]
                kept[row, chosen] = True
                kept[row, order[-1]] = True
        mask = kept[block_of][:, block_of]
        scores = (qh.double() @ kh.double().T / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        out[batch, :, head] = (scores.softmax(-1) @ vh.double()).to(out.dtype)
    return out


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 21), st.integers(1, 21)),
    algorithm=st.sampled_from((*ALGORITHMS, *POOLED)),
    tile=st.sampled_from(((1, 8, 8), (2, 4, 4), (1, 4, 8))),
    seed=st.integers(0, 100),
)
def test_sparse_equals_the_oracle(grid, algorithm, tile, seed):
    config = replace(NablaConfig.parse(algorithm), tile=tile)
    q, k, v = random_qkv(grid, batch=2, seed=seed)
    torch.testing.assert_close(
        nabla.attention(q, k, v, grid, config), oracle(q, k, v, grid, config), atol=1e-10, rtol=1e-10
    )


@pytest.mark.parametrize("grid", ((2, 30, 52), (1, 45, 80)))
@pytest.mark.parametrize("algorithm", ("nabla-0.6_sta-1-3-3", "nabla-0.4", "keep-0.1_pool-1-4-4"))
def test_published_sizes_equal_the_oracle(grid, algorithm):
    q, k, v = random_qkv(grid, heads=1)
    config = NablaConfig.parse(algorithm)
    torch.testing.assert_close(
        nabla.attention(q, k, v, grid, config), oracle(q, k, v, grid, config), atol=1e-10, rtol=1e-10
    )


@settings(max_examples=25, deadline=None)
@given(grid=st.tuples(st.integers(1, 5), st.integers(1, 25), st.integers(1, 25)), seed=st.integers(0, 100))
def test_threshold_one_is_dense(grid, seed):
    q, k, v = random_qkv(grid, seed=seed, dtype=torch.float32)
    dense = nabla.attention(q, k, v, grid, NablaConfig())
    sparse = nabla.attention(q, k, v, grid, NablaConfig(threshold=1))
    assert (dense - sparse).abs().max() < 1e-5


@pytest.mark.parametrize("grid", ((2, 30, 52), (1, 45, 80), (21, 3, 5)))
def test_threshold_one_is_dense_at_published_sizes(grid):
    q, k, v = random_qkv(grid, dtype=torch.float32)
    dense = nabla.attention(q, k, v, grid, NablaConfig())
    assert (nabla.attention(q, k, v, grid, NablaConfig(threshold=1.0)) - dense).abs().max() < 1e-5
    assert (nabla.attention(q, k, v, grid, NablaConfig(keep=1.0)) - dense).abs().max() < 1e-5


@settings(max_examples=8, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(3, 14), st.integers(3, 14)),
    algorithm=st.sampled_from(("dense", *ALGORITHMS, *POOLED)),
    seed=st.integers(0, 100),
)
def test_gradients_equal_the_oracle(grid, algorithm, seed):
    config = NablaConfig.parse(algorithm)
    given_qkv = [x.requires_grad_() for x in random_qkv(grid, seed=seed)]
    weight = random_qkv(grid, seed=seed + 1)[0]
    exact = NablaConfig(threshold=1) if algorithm == "dense" else config
    grads = torch.autograd.grad((nabla.attention(*given_qkv, grid, config) * weight).sum(), given_qkv)
    wanted = torch.autograd.grad((oracle(*given_qkv, grid, exact) * weight).sum(), given_qkv)
    for gradient, right in zip(grads, wanted):
        torch.testing.assert_close(gradient, right, atol=1e-9, rtol=1e-9)


def test_chunks_do_not_change_the_reference(monkeypatch):
    grid, config = (2, 20, 20), NablaConfig(threshold=0.6)
    qkv = [x.requires_grad_() for x in random_qkv(grid)]
    whole = nabla.attention(*qkv, grid, config)
    monkeypatch.setattr(reference, "TOKEN_PAIRS", 64 * 64 * 40)
    chunked = nabla.attention(*qkv, grid, config)
    torch.testing.assert_close(whole, chunked)
    for a, b in zip(torch.autograd.grad(whole.sum(), qkv), torch.autograd.grad(chunked.sum(), qkv)):
        torch.testing.assert_close(a, b)


def test_head_groups_do_not_change_the_selection(monkeypatch):
    grid, config = (2, 20, 20), NablaConfig(threshold=0.6)
    q, k, _ = random_qkv(grid, heads=5)
    whole = nabla.select_blocks(q, k, grid, config)
    lists = to_lists(whole)
    monkeypatch.setattr("nabla.selection.MAP_ENTRIES", 2 * 18 * 18)
    monkeypatch.setattr("nabla.block_lists.LIST_ENTRIES", 2 * 18 * 18)
    assert torch.equal(whole, nabla.select_blocks(q, k, grid, config))
    assert all(map(torch.equal, lists, to_lists(whole)))


def test_few_heads_at_a_time_give_the_same(monkeypatch):
    grid, config = (2, 11, 18), NablaConfig.parse("nabla-0.4_sta-1-3-1")
    q, k, v = random_qkv(grid, batch=2, heads=5)
    whole = nabla.attention(q, k, v, grid, config)
    blocks = nabla.plan(grid, config, "cpu").selection.layout.blocks
    monkeypatch.setattr(sys.modules["nabla.attention"], "LIST_ENTRIES", 2 * 2 * blocks**2)
    assert torch.equal(nabla.attention(q, k, v, grid, config), whole)


def test_rotation_on_the_way_into_tiles_is_rotation_before():
    grid, config = (2, 11, 18), NablaConfig(threshold=0.4)
    q, k, v = random_qkv(grid)
    angles = torch.rand(1, q.shape[1], 1, 4, dtype=torch.float64).repeat_interleave(2, -1)
    rotary = Rotary(angles.cos(), angles.sin())
    for each in (config, NablaConfig()):
        plan = nabla.plan(grid, each, "cpu")
        before = nabla.attend(rotate(q, rotary), rotate(k, rotary), v, plan)
        assert torch.equal(nabla.attend(q, k, v, plan, rotary), before)
        assert not torch.equal(nabla.attend(q, k, v, plan), before)


def test_kept_blocks_are_written_and_taken_again():
    grid, config = (2, 11, 18), NablaConfig(keep=0.3)
    q, k, v = random_qkv(grid)
    other_q, other_k, _ = random_qkv(grid, seed=1)
    plan = nabla.plan(grid, config, "cpu")
    blocks = plan.selection.layout.blocks
    mask = torch.zeros(1, 2, blocks, blocks, dtype=torch.bool)
    written = nabla.attend(q, k, v, plan, block_mask=ReusableBlockMask(mask, reuse=False))
    assert torch.equal(written, nabla.attend(q, k, v, plan))
    assert torch.equal(mask, nabla.select_blocks(q, k, grid, config))
    reused = nabla.attend(other_q, other_k, v, plan, block_mask=ReusableBlockMask(mask, reuse=True))
    tiles = [plan.selection.layout.to_tiles(x) for x in (other_q, other_k, v)]
    backend = BACKENDS[plan.backend]
    wanted = backend.attend(*tiles, backend.prepare(mask, plan.selection.layout))
    assert torch.equal(reused, plan.selection.layout.to_raster(wanted))
    assert torch.equal(mask, nabla.select_blocks(q, k, grid, config))


def test_higher_threshold_keeps_more_and_never_nothing():
    q, k, _ = random_qkv((3, 24, 24))
    thresholds = (1e-9, 0.05, 0.3, 0.6, 0.9, 1)
    masks = [nabla.select_blocks(q, k, (3, 24, 24), NablaConfig(threshold=t)) for t in thresholds]
    assert (masks[0].sum(-1) == 1).all() and masks[-1].all()
    assert all((small <= large).all() for small, large in zip(masks, masks[1:]))


def test_keep_keeps_a_fixed_share_of_the_most_probable():
    q, k, _ = random_qkv((3, 24, 24))
    kept = nabla.select_blocks(q, k, (3, 24, 24), NablaConfig(keep=0.2))
    assert (kept.sum(-1) == 6).all()
    assert (nabla.select_blocks(q, k, (3, 24, 24), NablaConfig(keep=1e-6)).sum(-1) == 1).all()


@pytest.mark.parametrize(
    "share, blocks, count", ((0.5, 3, 2), (0.5, 4, 2), (0.2, 1260, 252), (0.07, 100, 7), (0.1, 1, 1))
)
def test_keep_is_never_below_its_share(share, blocks, count):
    assert blocks_to_keep(share, blocks) == count


def test_autocast_does_not_change_the_selection():
    q, k, _ = random_qkv((4, 32, 32), dtype=torch.float32)
    plain = nabla.select_blocks(q, k, (4, 32, 32), NablaConfig(threshold=0.6))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nabla.select_blocks(q, k, (4, 32, 32), NablaConfig(threshold=0.6)), plain)


def test_ties_drop_lower_numbered_blocks_first():
    probability = torch.full((1, 1, 1, 8), 1 / 8)
    assert top_p_mask(probability, torch.tensor(0.4)).flatten().tolist() == [False] * 3 + [True] * 5


@pytest.mark.parametrize("is_compiled", (False, True))
def test_a_block_with_which_the_sum_is_the_cut_exactly_is_kept(is_compiled):
    """Of numbers that floats hold exactly: the published rule drops only what stays below the cut."""
    chosen_by = torch.compile(top_p_mask, fullgraph=True) if is_compiled else top_p_mask
    probability = torch.tensor([[1 / 2, 1 / 16, 1 / 4, 1 / 8, 1 / 16], [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4]])
    assert chosen_by(probability, torch.tensor(1 / 4)).tolist() == [
        [True, False, True, True, False],
        [True, True, False, True, True],
    ]
    # All blocks are as probable: a quarter of eight are two, of which the second stays.
    zeros = torch.zeros(1, 512, 1, 8)
    kept = nabla.select_blocks(zeros, zeros, (1, 8, 64), NablaConfig(threshold=0.75))
    assert (kept == torch.arange(8).ge(1)).all()


def test_block_lists_name_the_kept_blocks_in_order():
    blocks = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.6
    lists = to_lists(blocks)
    assert lists.indices.dtype == lists.counts.dtype == torch.int32 and lists.indices.shape == blocks.shape
    assert torch.equal(from_lists(lists), blocks)
    for place in itertools.product(range(2), range(3), range(7)):
        kept = blocks[place].nonzero().flatten().tolist()
        assert lists.counts[place] == len(kept)
        assert lists.indices[place].tolist() == kept + [0] * (7 - len(kept))


def test_half_precision_stays_close():
    grid, config = (2, 20, 20), NablaConfig(keep=0.3)
    q, k, v = random_qkv(grid, dtype=torch.bfloat16)
    result = nabla.attention(q, k, v, grid, config)
    assert result.dtype == torch.bfloat16
    assert relative_error(result.double(), oracle(q, k, v, grid, config).double()) < 1e-2


def test_shapes_that_do_not_fit_the_grid_are_refused():
    q, k, v = random_qkv((2, 8, 8))
    for bad in (((2, 8, 9), q, k, v), ((2, 8, 8), q, k[:, :-1], v), ((2, 8, 8), q[0], k[0], v[0])):
        with pytest.raises(InputError, match="do not fit grid"):
            nabla.attention(*bad[1:], bad[0], NablaConfig(threshold=0.5))
    with pytest.raises(InputError, match="three positive integers"):
        nabla.plan((0, 8, 8), NablaConfig(threshold=0.5), "cpu")


def test_nabla_imports_torch_alone():
    code = (
        "import sys, nabla; bad = {'diffusers', 'transformers', 'yaml', 'wan', 'imageio'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(nabla.__file__).parents[1]).returncode == 0
