"""Prepared clips as training takes them: whole folders, batches, noise levels and null captions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from starting import Forked, finish

from nabla import InputError
from wan.models.wan.geometry import GEOMETRY
from wan.training.clips import Clips
from wan.training.config import ObjectiveSettings
from wan.training.data import MicroBatches, validation_batch

UNIFORM = ObjectiveSettings(timesteps="uniform", shift=1.0, text_dropout=0.3)


def test_batches_are_a_function_of_seed_and_step_however_they_are_divided(prepared):
    clips = Clips([str(prepared)], 512)
    whole = MicroBatches(clips, UNIFORM, seed=3, batch_size=4, micro_batch=4)
    assert len({tuple(whole.numbers(step)) for step in range(8)}) > 4
    parts = [MicroBatches(clips, UNIFORM, 3, 4, 1, rank, 2) for rank in range(2)]
    for step in (5, 0):
        batch = whole[step]
        # Of a step, each process takes its micro-batches in turn.
        divided = [parts[place % 2][2 * step + place // 2] for place in range(4)]
        for name in batch._fields:
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part, name) for part in divided]))
    other = MicroBatches(clips, UNIFORM, seed=4, batch_size=4, micro_batch=4)[0]
    assert not torch.equal(other.noise, whole[0].noise)
    assert len(list(whole.load(2, 5, workers=0))) == 3


def test_every_clip_is_seen_as_often_as_any_and_batches_are_of_one_size(prepared):
    clips = Clips([str(prepared)], 512)
    batches = MicroBatches(clips, UNIFORM, seed=0, batch_size=3, micro_batch=3)
    seen = np.zeros(len(clips), dtype=int)
    for step in range(700):
        numbers = batches.numbers(step)
        assert len({clips.clips[number].size for number in numbers}) == 1
        np.add.at(seen, numbers, 1)
    assert seen.sum() == 2100 and abs(seen / 300 - 1).max() < 0.1
    for bucket in clips.buckets.values():
        assert np.ptp(seen[bucket]) <= 1


def test_texts_longer_than_the_transformer_takes_are_refused_before_a_run(prepared):
    longest = max(Clips([str(prepared)], 512).clips, key=lambda clip: clip.rows)
    assert len(Clips([str(prepared)], longest.rows)) == 7
    with pytest.raises(InputError, match=rf"sample \d: its text has .* takes {longest.rows - 1} .text_len."):
        Clips([str(prepared)], longest.rows - 1)


def test_clips_larger_than_the_rotary_table_are_refused_before_a_run(prepared):
    clips = Clips([str(prepared)], 512)
    config = {"in_channels": 16, "text_dim": 64, "rope_max_seq_len": 3}
    clips.check_fit(config, GEOMETRY)
    with pytest.raises(InputError, match=r"sample 1: its latents of \(2, 4, 6\) are too large for rope_max_seq_len 2"):
        clips.check_fit(config | {"rope_max_seq_len": 2}, GEOMETRY)


def test_an_error_in_a_worker_ends_the_program(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""
from wan.training.data_workers import load_items
class Broken:
    def __getitem__(self, number):
        raise RuntimeError(f"number {number} is broken")
for _ in load_items(Broken(), range(3), workers=1):
    pass
""")
    code, _, said = finish(Forked(program, cwd=tmp_path), seconds=60)
    assert code == 1 and "number 0 is broken" in said


def test_data_that_are_not_all_there_or_damaged_are_refused_in_one_line(prepared, tmp_path):
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-10])

    for name, spoil, message in (
        (
            "shard-000001.safetensors",
            Path.unlink,
            r"lacks 1 of its 3 shards, the first shard-000001.safetensors; start ",
        ),
        (
            "shard-000002.safetensors",
            Path.unlink,
            r"lacks 1 of its 3 shards, the first shard-000002.safetensors; start ",
        ),
        ("prepared.json", cut, r"prepared.json cannot be read as JSON .*; prepare the data again"),
        ("prepared.json", Path.unlink, r"prepared.json is missing; prepare the data again"),
        ("dropped.safetensors", cut, r"dropped.safetensors is damaged .*; remove it and start scripts/prepare_data.py"),
    ):
        data = Path(shutil.copytree(prepared, tmp_path / "data"))
        spoil(data / name)
        with pytest.raises(InputError, match=message) as refused:
            Clips([str(data)], 512)
        assert "\n" not in str(refused.value)
        shutil.rmtree(data)


def test_text_is_dropped_as_often_as_asked_and_noise_levels_fill_their_range(prepared):
    clips = Clips([str(prepared)], 512)
    batches = MicroBatches(clips, UNIFORM, seed=0, batch_size=4, micro_batch=4)
    draws = [batches.draw(step, place) for step in range(250) for place in range(4)]
    assert 0.25 < np.mean([draw.drops_caption for draw in draws]) < 0.35
    sigmas = np.sort([draw.sigma.item() for draw in draws])
    assert abs(sigmas - np.linspace(0, 1, 1000)).max() < 0.06
    _, dropped = clips.load(0, drops_caption=True)
    batch = batches[0]
    assert [torch.equal(text, dropped) for text in batch.text] == [batches.draw(0, n).drops_caption for n in range(4)]
    fixed = [validation_batch(clips, UNIFORM, n, 4) for n in range(4)]
    assert [round(one.sigmas.item(), 3) for one in fixed] == [0.125, 0.375, 0.625, 0.875]
    assert torch.equal(fixed[1].noise, validation_batch(clips, UNIFORM, 1, 4).noise)
