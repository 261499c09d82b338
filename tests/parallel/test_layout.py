"""How many ways a run is split, and which splits cannot be."""

from __future__ import annotations

import pytest

from nabla import InputError
from wan.parallel.layout import ParallelLayout, choose_layout


@pytest.mark.parametrize(
    "asked, layout",
    (
        (dict(processes=1, heads=12, guided=True), ParallelLayout()),
        (dict(processes=2, heads=12, guided=True), ParallelLayout(cfg=2)),
        (dict(processes=2, heads=12, guided=False), ParallelLayout(ulysses=2)),
        (dict(processes=8, heads=12, guided=True), ParallelLayout(cfg=2, ulysses=4)),
        (dict(processes=8, heads=12, guided=False), ParallelLayout(ulysses=8)),
        (dict(processes=8, heads=28, guided=True), ParallelLayout(cfg=2, ulysses=4)),
        (dict(processes=8, heads=28, guided=False), ParallelLayout(ulysses=8)),
        (dict(processes=3, heads=40, guided=True), ParallelLayout(ulysses=3)),
        (dict(processes=8, heads=40, guided=True, prompts=96), ParallelLayout(replicas=8)),
        (dict(processes=8, heads=40, guided=True, prompts=8), ParallelLayout(replicas=8)),
        (dict(processes=8, heads=40, guided=True, prompts=9), ParallelLayout(cfg=2, ulysses=4)),
        (dict(processes=8, heads=40, guided=True, prompts=6), ParallelLayout(replicas=2, cfg=2, ulysses=2)),
        (dict(processes=8, heads=40, guided=True, prompts=100, sharded=True), ParallelLayout(cfg=2, ulysses=4)),
        (dict(processes=8, heads=40, guided=True, ulysses=8), ParallelLayout(ulysses=8)),
        (dict(processes=8, heads=40, guided=True, prompts=4, replicas=4, cfg=1), ParallelLayout(replicas=4, ulysses=2)),
    ),
)
def test_the_layout_that_is_chosen(asked, layout):
    assert choose_layout(**asked) == layout


@pytest.mark.parametrize(
    "asked, message",
    (
        (dict(ulysses=16), "ulysses_size 16 is more than the 12 heads"),
        (dict(cfg=3), "cfg_size 3 is too many: there are two guidance branches"),
        (dict(cfg=2, guided=False), "cfg_size 2 is too many: guidance is off"),
        (dict(cfg=0), "cfg_size 0 is not a positive integer"),
        (dict(ulysses=3), "8 processes cannot be laid out .ulysses_size 3."),
        (dict(processes=64), "64 processes cannot be laid out .no size asked for."),
    ),
)
def test_layouts_that_cannot_be(asked, message):
    with pytest.raises(InputError, match=message):
        choose_layout(**dict(processes=8, heads=12, guided=True) | asked)
