"""The folder of a training run: whose parts it links, what a second start takes up there, refuses or makes anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training_runs import settings_dict, train

SHORT = {"steps": 1, "data": {"validation": None}, "ema": None}
PARTS = ("vae", "text_encoder", "tokenizer")


@pytest.fixture(scope="module")
def base(random_nano, prepared, tmp_path_factory) -> Path:
    """A run of one step, for others to begin from."""
    out = tmp_path_factory.mktemp("base") / "run"
    train(settings_dict(random_nano, prepared, out, **SHORT))
    return out


def test_a_run_that_has_no_checkpoint_yet_takes_the_parts_of_the_one_that_it_is_started_with(base, prepared, tmp_path):
    shutil.copytree(base, tmp_path / "run", symlinks=True)
    # As if it had been killed before its first.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(settings_dict(base / "latest" / "model", prepared, tmp_path / "run", mode="finetune", **SHORT))
    for name in PARTS:
        assert (tmp_path / "run" / "latest" / "model" / name).resolve() == base / "parts" / name


def test_parts_outlive_the_checkpoint_of_the_run_that_they_were_found_in(base, prepared, tmp_path):
    shutil.copytree(base, tmp_path / "base", symlinks=True)
    train(settings_dict(tmp_path / "base" / "latest" / "model", prepared, tmp_path / "run", mode="finetune", **SHORT))
    # As the run does with all but its last.
    shutil.rmtree(tmp_path / "base" / "checkpoints")
    for name in PARTS:
        part = tmp_path / "run" / "latest" / "model" / name
        assert part.resolve(strict=True) == tmp_path / "base" / "parts" / name
