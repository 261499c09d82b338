"""Memory that GPUs write into: each process has room for its share, and the others know where that begins."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from wan.parallel import peers
from wan.parallel.head_balance import split_sizes


@pytest.mark.parametrize("heads, processes", ((28, 8), (28, 3), (7, 4)))
def test_room_for_heads_and_tokens_that_do_not_divide(heads, processes, monkeypatch):
    sizes, known = [], []

    def rendezvous(memory, group):
        seen = {}
        sizes.append(len(memory))
        known.append(seen)

        def get_buffer(process, shape, dtype):
            seen[process] = shape
            return torch.empty(shape, dtype=dtype)

        return SimpleNamespace(get_buffer=get_buffer)

    monkeypatch.setattr(peers.symmetric_memory, "empty", torch.empty)
    monkeypatch.setattr(peers.symmetric_memory, "rendezvous", rendezvous)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    tokens, own_heads = split_sizes(1001, processes), split_sizes(heads, processes)
    for rank in range(processes):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: processes)
        buffers = peers.make_peer_buffers(group, tokens, own_heads, 2, 64, torch.empty(0))
        assert buffers.heads.shape == (3, 2, 1001, own_heads[rank], 64)
        assert buffers.tokens.shape == (2, tokens[rank], heads, 64)
        # All that the others take this process's memory for is what it has.
        arriving, leaving = known[-2:]
        assert arriving[rank] == buffers.heads.shape and leaving[rank] == buffers.tokens.shape
        assert buffers.table[:, 1:].tolist() == [[sum(tokens[:n]), tokens[n]] for n in range(processes)]
    # Every process has made as much as the one that needs most.
    assert all(len(set(sizes[first::2])) == 1 for first in (0, 1))
    assert all(seen == known[number % 2] for number, seen in enumerate(known))
    assert sizes[:2] == [max(map(math.prod, seen.values())) for seen in known[:2]]
