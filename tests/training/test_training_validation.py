"""Validation: clips of one size together give the losses that they give one by one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import settings_dict, train

from wan.training.config import TrainingSettings
from wan.training.evaluation import rank_batches, validation_losses
from wan.training.shutdown import Diverged
from wan.training.trainer import Trainer


@pytest.mark.parametrize("count", (1, 4, 7))
def test_clips_give_the_same_losses_together_as_one_by_one(random_nano, prepared, tmp_path, count):
    content = settings_dict(random_nano, prepared, tmp_path / "run", mode="finetune")
    trainer = Trainer(TrainingSettings.from_dict(content))
    shapes: list[tuple[int, ...]] = []
    trainer.transformer.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))

    def losses(micro_batch: int) -> dict[str, float]:
        shapes.clear()
        objective = trainer.settings.objective
        with torch.no_grad():
            return validation_losses(
                trainer.transformer, trainer.validation, count, micro_batch, objective, trainer.accelerator, 0
            )

    single = losses(1)
    assert len(shapes) == 2 * count and single["dense"] != single["sparse"]
    for micro_batch in (2, 3, 100):
        assert losses(micro_batch) == pytest.approx(single, rel=1e-5)
        # Compiled blocks compile once for a size of clips.
        assert len(set(shapes)) == len({shape[2:] for shape in shapes}) and len(shapes) <= 2 * count
        assert max(shape[0] for shape in shapes) <= micro_batch


def test_a_loss_that_is_not_finite_names_its_clip(random_nano, prepared, tmp_path):
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    shard = data / "shard-000001.safetensors"
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    save_file(tensors | {"3.latents": tensors["3.latents"] * torch.inf}, shard, metadata)
    content = settings_dict(random_nano, prepared, tmp_path / "run", steps=1, data={"validation": str(data)})
    where = r"dense nan at timestep \d+\.\d of sample 3 of .*shard-000001.*\('colour number 3'\)"
    with pytest.raises(Diverged, match=rf"^after step 0: the validation loss is not finite: {where}; sparse nan "):
        train(content)


@pytest.mark.parametrize("processes", (1, 2, 3))
@pytest.mark.parametrize("count", (1, 2, 5, 8, 13))
def test_every_clip_counts_once_whoever_takes_it(count, processes):
    numbers = list(range(100, 100 + count))
    for most in (1, 3, 4, 20):
        shares = [rank_batches(numbers, most, rank, processes) for rank in range(processes)]
        batches = sum(shares, [])
        assert sorted(number for own, counted in batches for number in own[:counted]) == numbers
        assert len({len(own) for own, _ in batches}) == 1 and len(batches[0][0]) <= most
        assert len({len(share) for share in shares}) == 1
