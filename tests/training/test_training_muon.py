"""Muon: its steps are those of torch, and a transformer that it trains goes on exactly where it was cut."""

from __future__ import annotations

import pytest
import torch
from training_runs import cut_after, settings_dict, train, weights

from nabla import InputError
from wan.training.config import TrainingSettings
from wan.training.muon import Muon, orthogonal, stacks
from wan.training.trainer import Trainer


@pytest.mark.parametrize("decay", (0.0, 0.2))
def test_muon_takes_the_steps_of_torch(decay):
    torch.manual_seed(0)
    shapes = (8, 4, 3, 3), (8, 20), (8, 4, 3, 3), (20, 8, 1, 1)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    matrices = [torch.nn.Parameter(weight.detach().flatten(1).clone()) for weight in weights]
    own = Muon(weights, lr=0.1, momentum=0.9, weight_decay=decay)
    others = torch.optim.Muon(matrices, lr=0.1, momentum=0.9, weight_decay=decay)
    for _ in range(3):
        for weight, matrix in zip(weights, matrices):
            weight.grad = torch.randn(weight.shape)
            matrix.grad = weight.grad.flatten(1).clone()
        own.step(), others.step()
        for weight, matrix in zip(weights, matrices):
            torch.testing.assert_close(weight.flatten(1), matrix, atol=0.02, rtol=0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 40, 16)).float())
    assert 0.6 < values.min() and values.max() < 1.3


def test_muon_stacks_no_more_than_it_may():
    sides = (4, 8), (30, 4), (4, 4), (8, 4), (6, 6), (4, 4), (50, 40)
    weights = [torch.nn.Parameter(torch.randn(side)) for side in sides]
    groups = [[tuple(weight.shape) for weight in group] for group in stacks(weights, elements=100)]
    assert groups == [[(4, 4), (4, 4), (4, 8)], [(8, 4)], [(30, 4)], [(6, 6)], [(50, 40)]]


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_all_else(random_nano, prepared, tmp_path):
    content = settings_dict(random_nano, prepared, tmp_path / "run", matrix_lr=0.01, optimizer={"weight_decay": 0.1})
    trainer = Trainer(TrainingSettings.from_dict(content))
    names = {weight: name for name, weight in trainer.transformer.named_parameters()}
    muon, adamw = trainer.state.optimizers
    of_muon, of_adamw = ([names[w] for w in each.param_groups[0]["params"]] for each in (muon, adamw))
    layers = [f"attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    layers += ["ffn.net.0.proj", "ffn.net.2"]
    assert sorted(of_muon) == sorted(f"blocks.{block}.{name}.weight" for block in (0, 1) for name in layers)
    assert sorted(of_muon + of_adamw) == sorted(names.values())
    assert type(muon) is Muon and muon.defaults["lr"] == 0.01
    assert [each.defaults["weight_decay"] for each in (muon, adamw)] == [0.1, 0.1]


def test_a_run_with_muon_learns_and_goes_on_exactly(random_nano, prepared, tmp_path):
    content = settings_dict(random_nano, prepared, tmp_path / "run", matrix_lr=0.02, optimizer={"schedule": "cosine"})
    rows = train(content)
    assert rows[6]["validation_dense"] < rows[0]["validation_dense"] - 0.02
    assert [row["lr"] for row in rows[1:4]] == [0, 0.0015, 0.003]
    cut_after(tmp_path / "run", 4, tmp_path / "again")
    assert train(content | {"out": str(tmp_path / "again")}) == rows
    for which in ("model", "ema"):
        one, other = (weights(tmp_path / run / "latest" / which) for run in ("run", "again"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(InputError, match="holds a run with matrix_lr 0.02, not None; choose another out"):
        train(content | {"matrix_lr": None})
