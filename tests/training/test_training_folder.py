"""The folder of a training run: whose parts it links, what a second start takes up there, refuses or makes anew."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import yaml
from places import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from starting import Forked, finish
from training_runs import exact_rows, settings_dict, train

import generate
from nabla import InputError
from scripts import train as train_script
from wan.files.atomic import lock_folder

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


@pytest.mark.parametrize("changes", ({"mode": "distill"}, {"mode": "finetune", "lora": {"rank": 2}}))
def test_weights_that_a_run_reads_again_are_those_that_it_began_with(base, random_nano, prepared, tmp_path, changes):
    later, link = tmp_path / "later", tmp_path / "link"
    train(settings_dict(random_nano, prepared, later, **SHORT | {"steps": 2}))
    link.symlink_to(base / "latest" / "model")
    content = settings_dict(link, prepared, tmp_path / "run", **SHORT, **changes)
    train(content)
    link.unlink()
    link.symlink_to(later / "latest" / "model")
    began = (base / "latest" / "model").resolve()
    with pytest.raises(InputError, match=f"with another checkpoint than .* it began with what was in {began}, and "):
        train(content | {"steps": 2})
    rows = train(content | {"steps": 2, "checkpoint": str(began)})
    assert [row["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize("which", ("train", "validation"))
def test_data_that_changed_since_a_run_began_are_refused(random_nano, prepared, tmp_path, which):
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    content = settings_dict(random_nano, prepared, tmp_path / "run", **SHORT | {"data": {which: str(data)}})
    train(content)
    rows = train(content | {"steps": 2})
    shard = data / "shard-000001.safetensors"
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    save_file(tensors | {"3.latents": tensors["3.latents"] + 1}, shard, metadata)
    with pytest.raises(InputError, match=f"with another data.{which} than there is now"):
        train(content | {"steps": 3})
    assert exact_rows(tmp_path / "run") == rows


def test_a_run_whose_data_are_not_written_down_goes_on_and_says_so(base, random_nano, prepared, tmp_path, caplog):
    shutil.copytree(base, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "inputs.json").unlink()
    train(settings_dict(random_nano, prepared, tmp_path / "run", **SHORT | {"steps": 2}))
    assert "run/inputs.json is missing; data and checkpoint are taken for those" in caplog.text
    assert (tmp_path / "run" / "inputs.json").is_file()


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold_for_ever() -> None:
        file = lock_folder(tmp_path)
        held.set()
        time.sleep(60)
        file.close()

    other = context.Process(target=hold_for_ever)
    other.start()
    assert held.wait(30)
    with pytest.raises(InputError, match=f"^{tmp_path} is in use by another run; wait for its end, stop it, or"):
        lock_folder(tmp_path)
    other.kill()
    other.join()
    lock_folder(tmp_path).close()


def test_two_runs_in_one_folder_are_refused(base, random_nano, prepared, tmp_path):
    shutil.copytree(base, tmp_path / "run", symlinks=True)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings_dict(random_nano, prepared, tmp_path / "run", **SHORT | {"steps": 2})))
    before = sorted(tmp_path.rglob("*"))
    with lock_folder(tmp_path / "run"):
        code, _, said = finish(Forked(ROOT / "scripts" / "train.py", "--config", config, cwd=tmp_path))
    assert code == 2 and said.count("error: ") == 1, said
    assert said.splitlines()[-1].startswith(f"error: {tmp_path / 'run'} is in use by another run")
    assert sorted(tmp_path.rglob("*")) == before


def test_generate_takes_the_lora_of_any_checkpoint_by_its_folder(random_nano, prepared, tmp_path, monkeypatch, capsys):
    changes = {"mode": "finetune", "lora": {"rank": 2}, "steps": 2, "every": {"checkpoint": 1}}
    train(settings_dict(random_nano, prepared, tmp_path / "run", **SHORT | changes))
    model = tmp_path / "run" / "checkpoints" / "step-00000001" / "model"
    monkeypatch.chdir(tmp_path)
    video = "--prompt cat --size 48*32 --frame_num 5 --sample_steps 1 --device cpu --save_file cat.mp4".split()
    base = ["--ckpt_dir", str(random_nano)]
    for given in (model, f"{model}:1.0", model / "lora"):
        assert generate.main([*video, *base, "--lora", str(given), "--overwrite"]) == 0
        assert f"lora: {model / 'lora' / 'pytorch_lora_weights.safetensors'} at 1" in capsys.readouterr().err
    for flags, message in (
        (["--ckpt_dir", str(model)], f"{model} holds a LoRA and no weights of a transformer; give it as --lora, and"),
        (["--ckpt_dir", str(model / "lora")], f"{model / 'lora'} holds a LoRA and no weights of a transformer"),
        ([*base, "--lora", str(model.parent)], f"lora {model.parent} is a folder; give the .safetensors file itself"),
    ):
        assert generate.main([*video, *flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {message}") and said.count("\n") == 1


@pytest.mark.parametrize("name", ("__0_0.distcp", ".metadata"))
def test_a_damaged_state_is_one_line_and_the_checkpoint_before_it_goes_on(
    base, random_nano, prepared, tmp_path, name, capfd
):
    content = settings_dict(random_nano, prepared, tmp_path / "run", **SHORT | {"steps": 2})
    shutil.copytree(base, tmp_path / "run", symlinks=True)
    rows = train(content)
    last = tmp_path / "run" / "checkpoints" / "step-00000002"
    file = last / "state" / name
    file.write_bytes(file.read_bytes()[:-100])
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    capfd.readouterr()
    assert train_script.main(["--config", str(config)]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {last / 'state'} is damaged (") and said.count("\n") == 1, said
    assert f"; remove {last} to go on from the one before it" in said
    shutil.rmtree(last)
    assert train(content) == rows
