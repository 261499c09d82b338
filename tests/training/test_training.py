"""Training runs on a CPU: losses fall, a continuation is exact, and what they write is what generate.py takes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
import yaml
from conftest import relative_error
from training_runs import TILE, cut_after, settings_dict, train, weights

import generate
import wan
from nabla import InputError, NablaConfig
from scripts import plot_training
from scripts import train as train_script
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.training.clips import Clips
from wan.training.config import TrainingSettings
from wan.training.data import MicroBatches
from wan.training.metrics import Metrics
from wan.training.objective import add_noise, mse_per_clip, predict_velocity
from wan.training.shutdown import Diverged, Stopped
from wan.training.trainer import Trainer

SAMPLES = {
    "prompts": ["A red cat"],
    "sampling": {"steps": 1, "guide_scale": 1},
    "video": {"size": "48*32", "frame_num": 5},
}


@pytest.fixture(scope="module")
def pretrained(random_nano, prepared, tmp_path_factory) -> tuple[dict, list[dict]]:
    """Settings and metrics of a run from a new transformer, not interrupted."""
    content = settings_dict(random_nano, prepared, tmp_path_factory.mktemp("run") / "run", samples=SAMPLES)
    return content, train(content)


def test_pretraining_lowers_the_loss_and_keeps_the_last_checkpoints(pretrained):
    content, rows = pretrained
    run = Path(content["out"])
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[6]["validation_dense"] < rows[0]["validation_dense"] - 0.02
    assert rows[6]["validation_sparse"] < rows[0]["validation_sparse"] - 0.02
    assert all(0 < row["kept"] < 1 for row in rows[1:])
    assert [row["lr"] for row in rows[1:4]] == [0, 0.0015, 0.003]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-0000000{n}" for n in (2, 4, 6)]
    assert (run / "latest").resolve().name == "step-00000006"
    videos = sorted(run.glob("samples/*/*.mp4"))
    assert [video.name for video in videos] == ["00-A-red-cat.mp4"] and iio.imread(videos[0]).shape == (5, 32, 48, 3)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert min(row[key] for key in ("waited", "clips_per_s", "tokens_per_s", "memory_gib")) > 0
    assert row["waited"] < row["seconds"]


@pytest.mark.parametrize("which", ("model", "ema"))
def test_generate_takes_a_checkpoint_as_it_is(pretrained, which, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path(pretrained[0]["out"]) / "latest" / which
    flags = ["--ckpt_dir", str(folder), "--prompt", "A red cat", "--base_seed", "0", "--device", "cpu"]
    assert generate.main([*flags, "--save_file", "out.mp4"]) == 0
    said = capsys.readouterr().err
    assert "nabla-0.5, backend gather, grid 2x2x3 = 12 tokens, 4 blocks of 4" in said and "1 steps" in said
    video = iio.imread("out.mp4").astype(int)
    (sample,) = folder.parents[1].glob("samples/*/*.mp4") if which == "ema" else [Path("out.mp4")]
    # Samples are made with the moving averages.
    assert video.shape == (5, 32, 48, 3) and abs(video - iio.imread(sample)).mean() < 0.1


def test_moving_averages_lie_between_the_weights_of_the_steps(pretrained):
    latest = Path(pretrained[0]["out"]) / "latest"
    last, averages = weights(latest / "model"), weights(latest / "ema")
    assert last.keys() == averages.keys()
    name = "blocks.0.ffn.net.2.weight"
    assert 0 < relative_error(averages[name], last[name]) < 0.1


@pytest.mark.parametrize("step", (0, 2, 4))
def test_a_killed_run_goes_on_exactly(pretrained, step, tmp_path):
    content, rows = pretrained
    cut_after(Path(content["out"]), step, tmp_path / "run")
    assert train(content | {"out": str(tmp_path / "run")}) == rows
    for which in ("model", "ema"):
        one, other = (weights(Path(run) / "latest" / which) for run in (content["out"], tmp_path / "run"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_sigterm_ends_a_run_with_a_checkpoint_to_go_on_from(pretrained, random_nano, prepared, tmp_path, monkeypatch):
    content, rows = pretrained
    content = content | {"out": str(tmp_path / "run"), "every": {"checkpoint": 100, "validation": 3}, "workers": 1}
    write = Metrics.write

    def write_and_ask(metrics: Metrics, row: dict) -> None:
        write(metrics, row)
        if row["step"] == 1:
            # As torchrun and Slurm do, to all processes.
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after step 2;"):
        patch.setattr(Metrics, "write", write_and_ask)
        train(content)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(content) == rows


def test_metrics_are_drawn(pretrained, tmp_path, capsys):
    run, picture = pretrained[0]["out"], tmp_path / "run.png"
    assert plot_training.main([run, "--out", str(picture)]) == 0 and iio.imread(picture).shape[0] > 500
    capsys.readouterr()
    assert plot_training.main([run, "--out", str(tmp_path / "bare")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'bare.png'}\n" and (tmp_path / "bare.png").is_file()
    for folder, out, reason in ((tmp_path, "run.png", "has no rows"), (run, "/no/run.png", "cannot be written")):
        assert plot_training.main([str(folder), "--out", out]) == 2 and reason in capsys.readouterr().err


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(pretrained, tmp_path):
    content, rows = pretrained
    shutil.copytree(content["out"], tmp_path / "run", symlinks=True)
    content = content | {"out": str(tmp_path / "run")}
    latest = tmp_path / "run" / "latest"
    # As if it had been killed between the last checkpoint and its link.
    latest.unlink()
    latest.symlink_to("checkpoints/step-00000004")
    assert train(content) == rows and latest.resolve().name == "step-00000006"
    with pytest.raises(InputError, match="holds a run with seed 0, not 1; choose another out"):
        train(content | {"seed": 1})
    longer = train(content | {"steps": 7, "micro_batch": 4})
    assert longer[:7] == rows and longer[7]["step"] == 7


def test_gradients_do_not_depend_on_accumulation(random_nano, prepared, tmp_path):
    runs = []
    for micro_batch in (1, 4):
        content = settings_dict(random_nano, prepared, tmp_path / str(micro_batch), micro_batch=micro_batch, steps=2)
        runs.append(train(content))
    for one, other in zip(*runs):
        for key in one.keys() - {"kept"}:
            assert one[key] == pytest.approx(other[key], rel=1e-5), key


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(random_nano, prepared, tmp_path, capsys):
    changes = {"optimizer": {"lr": 1e30, "warmup": 1}, "samples": None, "workers": 1}
    content = settings_dict(random_nano, prepared, tmp_path / "run", **changes)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert train_script.main(["--config", str(path)]) == 1
    said = capsys.readouterr().err
    where = r"(nan|inf) at timestep \d+\.\d of sample \d of .*\('colour number \d'\)"
    assert re.search(r"error: step \d: the loss is not finite: " + where, said), said
    kept = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert [folder.name for folder in kept] == ["step-00000002"]
    with pytest.raises(Diverged) as failed:
        train(content)
    # Though the traceback holds on to the run, or a process would wait for them at its end.
    assert failed.tb is not None and not multiprocessing.active_children()


def test_a_gradient_that_is_not_finite_stops_the_run(random_nano, prepared, tmp_path):
    trainer = Trainer(TrainingSettings.from_dict(settings_dict(random_nano, prepared, tmp_path / "run")))
    trainer.weights[0].register_hook(lambda gradient: gradient / 0 if trainer.state.step == 2 else None)
    with pytest.raises(Diverged, match=r"step 3: the gradient's norm is nan, though the loss is \d"):
        trainer.run()
    assert (tmp_path / "run" / "latest").resolve().name == "step-00000002"


def test_distillation_brings_sparse_attention_nearer_to_dense(random_nano, prepared, tmp_path):
    attention = {"algorithm": "nabla-0.2", "tile": TILE}
    content = settings_dict(
        random_nano,
        prepared,
        tmp_path / "run",
        mode="distill",
        attention=attention,
        optimizer={"lr": 1e-4, "warmup": 0},
        steps=16,
        ema=None,
        every={"checkpoint": 16, "validation": 16},
    )
    rows = train(content)
    assert rows[0]["validation_dense"] != rows[0]["validation_sparse"]
    batches = MicroBatches(Clips([str(prepared)], 512), TrainingSettings.from_dict(content).objective, 1, 4, 4)
    teacher = load_transformer(random_nano)

    @torch.no_grad()
    def distance(folder: Path) -> float:
        student = load_transformer(folder)
        wan.apply_attention(student, NablaConfig.from_dict(attention))
        total = 0.0
        for batch in map(batches.__getitem__, range(6)):
            inputs = add_noise(batch.latents, batch.noise, batch.sigmas), batch.sigmas, batch.text
            total += mse_per_clip(predict_velocity(student, *inputs), predict_velocity(teacher, *inputs)).mean().item()
        return total

    assert distance(tmp_path / "run" / "latest" / "model") < 0.9 * distance(random_nano)


def test_a_teacher_computes_what_its_student_starts_from(random_nano, prepared, tmp_path):
    attention = {"algorithm": "nabla-0.2", "tile": TILE}
    changes = {"mode": "distill", "attention": attention, "precision": "bfloat16"}
    trainer = Trainer(TrainingSettings.from_dict(settings_dict(random_nano, prepared, tmp_path / "run", **changes)))
    trainer.transformer.nabla.switched_off, batch = True, trainer.batches[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, teachers = (
            predict_velocity(model, batch.noise, batch.sigmas, batch.text) for model in (trainer.model, trainer.teacher)
        )
    assert torch.equal(ours, teachers)


def load_transformer(folder: Path) -> torch.nn.Module:
    return components.load_transformer(components.transformer_component(Checkpoint.open(folder)), torch.float32, "cpu")


def test_lora_trains_adapters_alone_and_writes_what_diffusers_loads(random_nano, prepared, tmp_path):
    content = settings_dict(
        random_nano,
        prepared,
        tmp_path / "run",
        mode="finetune",
        lora={"rank": 2, "alpha": 6},
        optimizer={"lr": 0.01},
        every={"checkpoint": 4},
    )
    rows = train(content)
    assert rows[6]["validation_sparse"] < rows[0]["validation_sparse"] - 0.01
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not (checkpoints / "step-00000004" / "model" / "transformer").exists()
    last = checkpoints / "step-00000006" / "model"
    adapted = load_transformer(random_nano)
    adapted.load_lora_adapter(last / "lora", use_safetensors=True)
    assert adapted.peft_config["default_0"].lora_alpha == 6
    latents, text = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 512, 64)
    timestep = torch.tensor([500.0])
    with torch.no_grad():
        outputs = [
            model(latents, timestep, text, return_dict=False)[0]
            for model in (adapted, load_transformer(last), load_transformer(random_nano))
        ]
    assert relative_error(outputs[1], outputs[0]) < 1e-5 < relative_error(outputs[2], outputs[0])
    cut_after(tmp_path / "run", 4, tmp_path / "again")
    assert train(content | {"out": str(tmp_path / "again")}) == rows


def test_full_fine_tuning_in_bfloat16_keeps_float32_weights(random_nano, prepared, tmp_path):
    content = settings_dict(
        random_nano, prepared, tmp_path / "run", mode="finetune", precision="bfloat16", steps=3, ema=None
    )
    rows = train(content)
    assert rows[3]["validation_dense"] < rows[0]["validation_dense"]
    trained = weights(tmp_path / "run" / "latest" / "model")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    # Smaller changes than bfloat16 would keep.
    name = "blocks.0.attn1.to_q.weight"
    change = (trained[name] - load_transformer(random_nano).state_dict()[name]).abs().max()
    assert 0 < change < 0.02


@pytest.mark.gpu
def test_compiled_training_on_a_gpu(random_nano, prepared, tmp_path):
    content = settings_dict(random_nano, prepared, tmp_path / "run", precision="bfloat16", compile=True, workers=1)
    rows = train(content)
    assert rows[6]["validation_sparse"] < rows[0]["validation_sparse"] - 0.02
    assert all(0 < row["kept"] < 1 for row in rows[1:])


def test_what_does_not_fit_together_is_refused(random_nano, prepared, tmp_path):
    wide = SAMPLES | {"video": {"size": "128*32", "frame_num": 5}}
    for changes, message in (
        ({"batch_size": 3}, "batch_size 3 is not a multiple of micro_batch 2 x 1 processes"),
        ({"shard": True}, "shard spreads weights over processes, and here is one"),
        ({"data": {"train": str(tmp_path)}}, "holds no prepared clips"),
        ({"transformer": {"text_dim": 32}}, "prepared with 64 columns of text states, but the transformer takes 32"),
        ({"transformer": {"heads": 2}}, "transformer: .*'heads'"),
        ({"transformer": {"text_len": 2}}, r"its text has \d+ tokens, and the transformer takes 2 .text_len."),
        ({"transformer": {"rope_max_seq_len": 2}}, "too large for rope_max_seq_len 2"),
        (
            {"transformer": {"rope_max_seq_len": 3}, "samples": wide},
            "5 frames of 128.32 are too many; at most 9 of 48.48",
        ),
    ):
        content = settings_dict(random_nano, prepared, tmp_path / "run", **changes)
        with pytest.raises(InputError, match=message):
            Trainer(TrainingSettings.from_dict(content))
    Trainer(TrainingSettings.from_dict(settings_dict(random_nano, prepared, tmp_path / "run")))
