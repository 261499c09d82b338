"""On a CUDA GPU: means in place of dropped blocks, against the reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import relative_error
from test_gpu import FULL, PARTIAL, dense_error, needs_cudnn, random_qkv

import nabla
from nabla import NablaConfig
from nabla.backends import reference
from nabla.block_lists import to_lists
from nabla.dropped import TileMeans, join_means, tile_means
from nabla.kernels.dropped_means import join_means_of_lists
from nabla.selection import block_means
from nabla.tiling import TileLayout

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "algorithm", ("keep-0.2_dropped-mean", "keep-0.1_pool-1-4-4_dropped-mean", "dropped-mean_sta-1-3-3")
)
@pytest.mark.parametrize("grid", (FULL, PARTIAL))
@pytest.mark.parametrize(
    "backend, dtype", (("flex", torch.bfloat16), ("flex", torch.float32), ("cudnn", torch.bfloat16))
)
def test_means_in_place_of_dropped_blocks_equal_the_reference(grid, algorithm, backend, dtype):
    if backend == "cudnn":
        needs_cudnn()
    config = replace(NablaConfig.parse(algorithm), backend=backend)
    qkv = random_qkv(grid, dtype=dtype)
    layout = TileLayout.build(grid, config.tile, "cuda")
    tiles = [layout.to_tiles(x.double()) for x in qkv]
    means = TileMeans(*(tile_means(x, block_means(x, layout), layout) for x in tiles[1:]), layout.sizes)
    blocks = reference.prepare(nabla.select_blocks(*qkv[:2], grid, config), layout)
    exact, without = (layout.to_raster(reference.attend(*tiles, blocks, each)) for each in (means, None))
    plan = nabla.plan(grid, config, "cuda", dtype, qkv[0].shape[-1])
    compiled = torch.compile(nabla.attend, fullgraph=True, dynamic=False)
    for found in (nabla.attend(*qkv, plan), compiled(*qkv, plan)):
        error = relative_error(found.double(), exact)
        assert error < 1.5 * dense_error(*qkv) and error < 0.1 * relative_error(without, exact)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("blocks, block, dim", ((9, 64, 128), (70, 64, 64), (7, 16, 40), (5, 128, 96)))
@pytest.mark.parametrize("spread", (1, 60))
def test_means_are_joined_in_one_pass_as_the_slow_way(spread, blocks, block, dim, dtype):
    """With a large spread some queries see a mean far more than all that they keep."""
    q, out = (x.transpose(1, 2) for x in random_qkv((2, blocks, block // 2), 3, dim, dtype)[:2])
    q, log_sums = q * spread, 4 + out[..., 0].float()
    generator = torch.Generator("cuda").manual_seed(1)
    kept = torch.rand(1, 3, blocks, blocks, generator=generator, device="cuda") < 0.3
    kept[:, :, 1] = True
    k, v = torch.randn(2, 1, 3, blocks, dim, generator=generator, device="cuda")
    sizes = torch.randint(1, block + 1, (blocks,), generator=generator, device="cuda", dtype=torch.int32)
    # Rounded as the kernel rounds them.
    k, v = ((x * scale).to(dtype).double() / scale for x, scale in ((k, dim**-0.5 / math.log(2)), (v, 1)))
    exact = join_means(q.double(), out.double(), log_sums.double(), kept, TileMeans(k, v, sizes))
    even = torch.arange(blocks, device="cuda") % 2 == 0
    lists = [to_lists(kept & even), to_lists(kept & ~even)]
    found = join_means_of_lists(q, out.clone(), log_sums, lists, TileMeans(k.float(), v.float(), sizes))
    assert relative_error(found.double(), exact) < (1e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps)
    own = slice(block, 2 * block)
    torch.testing.assert_close(found[:, :, own], out[:, :, own])
