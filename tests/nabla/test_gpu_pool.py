"""Blocks chosen by parts of tiles on a GPU, against the slow twins of each kernel."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import relative_error
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nabla
from nabla import NablaConfig
from nabla.attention import ReusableBlockMask
from nabla.block_lists import BlockLists, from_lists
from nabla.kernels.part_map import part_map
from nabla.kernels.row_selection import Rule, lists_of_map
from nabla.kernels.tile_gather import tiles_and_means
from nabla.rotary import Rotary
from nabla.selection import Selection, block_map, block_means, top_k_mask, top_p_mask
from nabla.tiling import TileLayout

pytestmark = pytest.mark.gpu
SIZES = st.sampled_from(
    (
        ((1, 8, 8), (1, 4, 4)),
        ((1, 8, 8), (1, 8, 4)),
        ((1, 8, 8), (1, 2, 2)),
        ((2, 4, 8), (1, 4, 4)),
        ((2, 8, 8), (1, 4, 4)),
    )
)
GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
FOUR = NablaConfig(keep=0.2, pool=(1, 4, 4))


def random_qkv(grid, heads=3, dim=64, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = 1, math.prod(grid), heads, dim
    return [2 * torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(3)]


@settings(max_examples=12, deadline=None)
@given(grid=GRIDS, sizes=SIZES, dtype=st.sampled_from((torch.bfloat16, torch.float32)))
def test_the_gather_averages_parts_as_the_slow_way(grid, sizes, dtype):
    layout = TileLayout.build(grid, sizes[0], "cuda", sizes[1])
    x, angles, _ = random_qkv(grid, dtype=dtype)
    angles = angles[:, :, :1, ::2].float().repeat_interleave(2, -1)
    tiles, means = tiles_and_means(x, layout, Rotary(angles.cos(), angles.sin()))
    torch.testing.assert_close(means, block_means(tiles, layout), rtol=1e-5, atol=2e-6)
    plain = TileLayout.build(grid, sizes[0], "cuda")
    assert torch.equal(tiles, tiles_and_means(x, plain, Rotary(angles.cos(), angles.sin()))[0])


@settings(max_examples=10, deadline=None)
@example(blocks=9, parts=4, dim=200, has_empty=True, half=True, seed=0)
@given(
    blocks=st.integers(1, 150),
    parts=st.sampled_from((2, 3, 4, 8, 16)),
    dim=st.sampled_from((40, 64, 96, 128, 200)),
    has_empty=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_map_of_parts_is_the_slow_one(blocks, parts, dim, has_empty, half, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k = 2 * torch.randn(2, 1, 2, blocks * parts, dim, device="cuda", generator=generator)
    sizes = torch.full((blocks, parts), 4, dtype=torch.int32, device="cuda")
    if has_empty:
        sizes[:, 1:] *= torch.randint(0, 2, (blocks, parts - 1), device="cuda", generator=generator)
    found = part_map(q, k, sizes, has_empty, half)
    wanted = block_map(q.double(), k.double(), sizes, sizes)
    assert (found - wanted).abs().max() < (2e-3 if half else 5e-6) * wanted.max()
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=0, atol=1e-5)


def test_numbers_beyond_float16_are_no_trouble():
    sizes = torch.full((50, 4), 16, dtype=torch.int32, device="cuda")
    q, k = torch.randn(2, 1, 1, 200, 64, device="cuda")
    wanted = block_map(q, k, sizes, sizes)
    torch.testing.assert_close(part_map(q * 1e6, k * 1e-6, sizes, False, True), wanted, rtol=5e-3, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(grid=GRIDS, rule=st.sampled_from(("keep-0.2", "nabla-0.5", "nabla-0.6_min-0.1_max-0.3_sta-1-3-1")), sizes=SIZES)
def test_fast_selection_is_the_slow_one(grid, rule, sizes):
    config = replace(NablaConfig.parse(rule), tile=sizes[0], pool=sizes[1])
    q, k, _ = random_qkv(grid, dtype=torch.float32)
    selection = Selection.build(grid, config, "cuda")
    slow = selection.block_mask(*(block_means(selection.layout.to_tiles(x), selection.layout) for x in (q, k)))
    differ = nabla.select_blocks(q, k, grid, config) != slow
    # Where float32 rounds two probabilities to one, or a sum to the cut, the neighbour at the edge may be kept.
    assert differ.sum() <= 2 + 1e-4 * differ.numel()


def test_half_precision_chooses_what_float32_does_but_for_near_ties():
    grid = (9, 45, 80)
    q, k, _ = random_qkv(grid, dim=128)
    half, exact = (nabla.select_blocks(x, y, grid, FOUR) for x, y in ((q, k), (q.float(), k.float())))
    assert (half.sum(-1) == exact.sum(-1)).all() and (half != exact).float().mean() < 2e-3


@pytest.mark.parametrize("rule", ("keep-0.13", "nabla-0.7", "nabla-0.6_min-0.05_max-0.2"))
def test_lists_of_probabilities_keep_what_the_rule_says(rule):
    """Over half a million rows of probabilities with many ties, against the sort."""
    selection = Selection.build((21, 45, 80), NablaConfig.parse(rule), "cuda")
    cut, count, blocks = selection.cut, selection.count, selection.layout.blocks
    generator = torch.Generator("cuda").manual_seed(0)
    for levels, heads in ((12, 200), (2**20, 200)):
        weights = torch.randint(1, levels, (1, heads, blocks, blocks), device="cuda", generator=generator).float() ** 3
        probability = weights / weights.sum(-1, keepdim=True)
        counts = torch.empty(1, 1, heads, blocks, dtype=torch.int32, device="cuda")
        indices = torch.empty(*counts.shape, blocks, dtype=torch.int32, device="cuda")
        lists_of_map(probability, Rule(None, cut, count, selection.least, selection.most), counts, indices, True)
        for start in range(0, heads, 50):
            of = slice(start, start + 50)
            kept, some = from_lists(BlockLists(counts[0, :, of], indices[0, :, of])), probability[:, of]
            if cut is None:
                assert torch.equal(kept, top_k_mask(some, count))
            else:
                by_sort = top_p_mask(some, cut, selection.least, selection.most)
                # Sums are in another order, and where one meets the cut within rounding a neighbour is kept.
                assert ((kept != by_sort).sum(-1) > 0).float().mean() < 1e-3


def test_attention_by_parts_is_the_reference_s():
    grid = (3, 30, 52)
    q, k, v = random_qkv(grid, dim=128, dtype=torch.float32)
    exact = nabla.attention(q, k, v, grid, replace(FOUR, backend="reference"))
    assert relative_error(nabla.attention(q, k, v, grid, replace(FOUR, backend="flex")), exact) < 5e-3


def test_kept_masks_name_the_blocks_that_are_chosen_without_them():
    grid = (3, 30, 52)
    q, k, v = random_qkv(grid, dim=128)
    plan = nabla.plan(grid, FOUR, "cuda", q.dtype, 128)
    mask = torch.empty(1, 3, *2 * (plan.selection.layout.blocks,), dtype=torch.bool, device="cuda")
    first = nabla.attend(q, k, v, plan, block_mask=ReusableBlockMask(mask, False))
    assert torch.equal(first, nabla.attend(q, k, v, plan))
    assert torch.equal(first, nabla.attend(q, k, v, plan, block_mask=ReusableBlockMask(mask, True)))


@pytest.mark.parametrize("rules", (("nabla-0.5", "nabla-0.9"), ("keep-0.1", "keep-0.3")))
def test_values_of_one_rule_and_pool_are_one_graph(rules):
    grid = (2, 24, 40)
    q, k, v = random_qkv(grid)
    torch._dynamo.reset()
    compiled = torch.compile(nabla.attend, fullgraph=True, dynamic=False)
    plans = [nabla.plan(grid, replace(NablaConfig.parse(rule), pool=(1, 4, 4)), "cuda", q.dtype) for rule in rules]
    results = []
    for plan in plans:
        # Before the first one's call its kernel is probed, which makes graphs of other shapes.
        with torch._dynamo.config.patch(error_on_recompile=bool(results)):
            results.append(compiled(q, k, v, plan))
    # At last, for outside of a graph tensors have other dispatch keys, with which the kernel's own is made once more.
    for plan, result in zip(plans, results):
        assert relative_error(result, nabla.attend(q, k, v, plan)) < 1e-2
