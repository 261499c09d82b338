"""Heads are assigned to processes so that none waits long for another."""

from __future__ import annotations

import torch

from wan.parallel.head_balance import assign_heads, interleaved, split_sizes


def test_heads_that_do_not_divide_are_shared_out_whole():
    counts = split_sizes(28, 8)
    assert counts == [4, 4, 4, 4, 3, 3, 3, 3] and split_sizes(7, 4) == [2, 2, 2, 1]
    load = torch.arange(28.0).repeat(3, 1)
    for order in (assign_heads(load, counts), interleaved(28, 8)[None]):
        assert (order.sort(1).values == torch.arange(28)).all()
    # Those with a head more get lighter ones for it.
    sums = torch.stack([load.gather(1, part).sum(1) for part in assign_heads(load, counts).split(counts, dim=1)])
    assert sums.max() <= 1.1 * sums.mean()


def test_heads_are_assigned_so_that_all_have_as_much_to_do():
    load = torch.cat((torch.full((20,), 0.05), torch.full((20,), 0.35)))[torch.rand(3, 40).argsort(1)]
    for parts in (2, 3, 8):
        counts = split_sizes(40, parts)
        order = assign_heads(load, counts)
        assert (order.sort(1).values == torch.arange(40)).all()
        sums = [load.gather(1, part).sum(1) for part in order.split(counts, dim=1)]
        assert (torch.stack(sums).amax(0) - torch.stack(sums).amin(0)).max() <= 0.36
        assert sorted(interleaved(40, parts).tolist()) == list(range(40))
