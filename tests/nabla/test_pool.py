"""Blocks chosen by parts of tiles, and limits of a threshold, against the definition token by token."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nabla_attention import random_qkv

import nabla
from nabla import NablaConfig
from nabla.selection import Selection, block_map, block_means, top_k_mask, top_p_mask
from nabla.tiling import TileLayout

TILES = (((1, 8, 8), (1, 4, 4)), ((1, 8, 8), (1, 2, 8)), ((2, 4, 4), (1, 4, 2)), ((2, 2, 4), (1, 1, 1)))
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 19), st.integers(1, 19))


def numbered(grid, size):
    """For each token of a grid in raster order, the box of such a size that it is in: by place along each axis."""
    return [tuple(p // s for p, s in zip(place, size)) for place in itertools.product(*map(range, grid))]


def map_by_definition(q, k, grid, config):
    """The block map of one head, q and k (S, D), by loops over tiles and parts."""
    tile_of, part_of = numbered(grid, config.tile), numbered(grid, config.pool)
    parts, tiles = sorted(set(part_of)), sorted(set(tile_of))
    tile_of_part = dict(zip(part_of, tile_of))
    mean_q, mean_k = (
        torch.stack([x[[n for n, one in enumerate(part_of) if one == part]].mean(0) for part in parts]) for x in (q, k)
    )
    pairs = (mean_q @ mean_k.T / math.sqrt(q.shape[-1])).softmax(-1)
    rows = []
    for tile in tiles:
        own = [n for n, part in enumerate(parts) if tile_of_part[part] == tile]
        by_tile = [
            [pairs[a, [n for n, p in enumerate(parts) if tile_of_part[p] == t]].sum() for t in tiles] for a in own
        ]
        rows.append(torch.tensor(by_tile).mean(0))
    return torch.stack(rows)


@settings(max_examples=15, deadline=None)
@given(grid=GRIDS, sizes=st.sampled_from(TILES), seed=st.integers(0, 99))
def test_the_map_of_parts_is_the_definition(grid, sizes, seed):
    config = NablaConfig(keep=0.5, tile=sizes[0], pool=sizes[1])
    q, k, _ = random_qkv(grid, seed=seed, dtype=torch.float32)
    layout = TileLayout.build(grid, config.tile, "cpu", config.pool)
    means = [block_means(layout.to_tiles(x), layout) for x in (q, k)]
    found = block_map(*means, layout.part_sizes, layout.part_sizes)
    for head in range(q.shape[2]):
        torch.testing.assert_close(found[0, head], map_by_definition(q[0, :, head], k[0, :, head], grid, config))


@settings(max_examples=15, deadline=None)
@given(grid=GRIDS, tile=st.sampled_from(((1, 8, 8), (2, 4, 4))), rule=st.sampled_from(("nabla-0.6", "keep-0.3")))
def test_one_part_is_the_plain_rule_to_the_bit(grid, tile, rule):
    plain = NablaConfig(**vars(NablaConfig.parse(rule)) | {"tile": tile})
    assert NablaConfig(**vars(plain) | {"pool": tile}) == plain
    q, k, _ = random_qkv(grid, dtype=torch.float32)
    layout = TileLayout.build(grid, tile, "cpu", tile)
    tiles = layout.to_tiles(q)
    sums = (tiles.unflatten(2, (layout.blocks, layout.block)) * layout.valid[..., None]).sum(3)
    assert torch.equal(block_means(tiles, layout), sums / layout.sizes[:, None])
    means = [block_means(layout.to_tiles(x), layout) for x in (q, k)]
    assert torch.equal(block_map(*means), (means[0] @ means[1].mT * q.shape[-1] ** -0.5).softmax(-1))


def test_maps_of_few_rows_at_a_time_are_the_same(monkeypatch):
    grid, config = (3, 20, 20), NablaConfig(keep=0.3, pool=(1, 4, 4))
    q, k, _ = random_qkv(grid, dtype=torch.float32)
    whole = nabla.select_blocks(q, k, grid, config)
    monkeypatch.setattr("nabla.selection.MAP_ENTRIES", 108 * 40)
    assert torch.equal(nabla.select_blocks(q, k, grid, config), whole)


def test_parts_find_what_means_of_tiles_hide():
    """One part of a tile has the keys that queries look for and another their opposite, so the mean says nothing."""
    q, k, _ = (torch.zeros(1, 4 * 64, 1, 16) for _ in range(3))
    q[..., 0] = 8
    layout = TileLayout.build((1, 8, 32), (1, 8, 8), "cpu")
    third = layout.source.view(4, 64)[2]
    k[0, third[:32], 0, 0], k[0, third[32:], 0, 0] = 8, -8
    kept = nabla.select_blocks(q, k, (1, 8, 32), NablaConfig(keep=0.25, pool=(1, 4, 4)))
    assert (kept[0, 0].nonzero()[:, 1] == 2).all()
    assert not nabla.select_blocks(q, k, (1, 8, 32), NablaConfig(keep=0.25))[0, 0, :, 2].any()


@pytest.mark.parametrize("limits, counts", (((0.5, None), (5, 10)), ((None, 0.2), (1, 2)), ((0.2, 0.3), (2, 3))))
def test_limits_bound_what_a_threshold_keeps(limits, counts):
    q, k, _ = random_qkv((5, 8, 16), dtype=torch.float32, spread=4)
    grid, (least, most) = (5, 8, 16), limits
    free = nabla.select_blocks(q, k, grid, NablaConfig(threshold=0.6))
    bound = nabla.select_blocks(q, k, grid, NablaConfig(threshold=0.6, keep_min=least, keep_max=most))
    assert torch.equal(bound.sum(-1), free.sum(-1).clamp(*counts))
    # What is added or dropped is next in order of probability, so that one mask holds the other.
    assert ((bound & free) == bound).logical_or((bound & free) == free).all(-1).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    blocks=st.integers(1, 12),
    cut=st.floats(0, 0.99),
    limits=st.tuples(*2 * (st.integers(1, 12),)),
)
def test_limits_are_unions_and_intersections_with_the_most_probable(seed, blocks, cut, limits):
    least, most = (torch.tensor(min(n, blocks)) for n in sorted(limits))
    # Of few values, so that many tie.
    weights = torch.randint(1, 4, (6, blocks), generator=torch.Generator().manual_seed(seed)).float()
    probability, cut = weights / weights.sum(-1, keepdim=True), torch.tensor(cut)
    wanted = (top_p_mask(probability, cut) | top_k_mask(probability, least)) & top_k_mask(probability, most)
    assert torch.equal(top_p_mask(probability, cut, least, most), wanted)


def test_a_window_is_kept_whatever_the_cap():
    selection = Selection.build((3, 16, 16), NablaConfig.parse("nabla-0.9_max-0.1_sta-3-1-1"), "cpu")
    q, k, _ = random_qkv((3, 16, 16), dtype=torch.float32)
    kept = nabla.select_blocks(q, k, (3, 16, 16), NablaConfig.parse("nabla-0.9_max-0.1_sta-3-1-1"))
    assert selection.window is not None and kept[:, :, selection.window[0, 0]].all()
