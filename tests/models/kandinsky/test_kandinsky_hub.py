"""Kandinsky-5 by hub ids: told by names of files where there is no JSON, its other models from where they are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import filter_repo_objects

import generate
from wan import Checkpoint, CheckpointError
from wan.checkpoints import locate
from wan.models import companions
from wan.models.kandinsky.family import KANDINSKY

LITE = "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s"
VAE, QWEN, CLIP = "hunyuanvideo-community/HunyuanVideo", "Qwen/Qwen2.5-VL-7B-Instruct", "openai/clip-vit-large-patch14"
PRO = "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers"
TRANSFORMER = "model/kandinsky5lite_t2v_sft_5s.safetensors"
# What else the repositories hold, and nobody needs.
OTHERS = {
    LITE: ("README.md", "assets/vbench.png"),
    VAE: ("README.md", "model_index.json", "transformer/diffusion_pytorch_model.safetensors"),
    QWEN: ("README.md",),
    CLIP: ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"),
    PRO: ("README.md", "assets/generation.mp4"),
}


@pytest.fixture(scope="module")
def hub(kandinsky_nano, kandinsky_diffusers, tmp_path_factory) -> Path:
    """Repositories by their ids, with the models of the tiny checkpoints."""
    hub = tmp_path_factory.mktemp("hub")
    for inner, place in (("vae", f"{VAE}/vae"), ("text_encoder", QWEN), ("text_encoder2", CLIP)):
        shutil.copytree(kandinsky_nano / inner, hub / place)
    shutil.copytree(kandinsky_diffusers, hub / PRO)
    (hub / LITE / TRANSFORMER).parent.mkdir(parents=True)
    (file,) = (kandinsky_nano / "model").iterdir()
    shutil.copy(file, hub / LITE / TRANSFORMER)
    for name, files in OTHERS.items():
        for other in files:
            (hub / name / other).parent.mkdir(exist_ok=True)
            (hub / name / other).write_text("nobody needs this")
    return hub


def files_of(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


@pytest.fixture
def downloads(hub, tmp_path, monkeypatch):
    """Folders by the ids of what was asked of the hub, with what was downloaded, as `snapshot_download` does it."""
    folders = {}

    def snapshot_download(name, allow_patterns, ignore_patterns):
        folders[name] = tmp_path / "cache" / name.replace("/", "--")
        for file in filter_repo_objects(
            files_of(hub / name), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (folders[name] / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name / file, folders[name] / file)
        # Of which nothing was wanted there is no folder.
        return str(folders[name])

    # What an earlier test had is not there any more.
    companions._download.cache_clear()
    monkeypatch.setattr(locate, "snapshot_download", snapshot_download)
    monkeypatch.setattr(locate.HfApi, "list_repo_files", lambda self, name: files_of(hub / name))
    return folders


def test_a_native_repository_is_told_by_names_and_its_other_models_are_had_from_theirs(hub, downloads):
    checkpoint = Checkpoint.open(LITE)
    assert checkpoint.family is KANDINSKY and checkpoint.published and checkpoint.name == LITE
    assert list(downloads) == [LITE] and files_of(downloads[LITE]) == [TRANSFORMER]
    checkpoint.require_companions()
    checkpoint.require_tokenizer()
    assert set(downloads) == {LITE, VAE, QWEN, CLIP}
    for name, folder in downloads.items():
        assert set(files_of(hub / name)) - set(files_of(folder)) == set(OTHERS[name])
    assert checkpoint.folder_of("vae") == downloads[VAE] / "vae"


def test_what_is_given_is_not_downloaded(hub, downloads, kandinsky_nano, tmp_path):
    given = {"vae": str(kandinsky_nano / "vae"), "text_encoder": QWEN}
    given["text_encoder_2"] = str(kandinsky_nano / "text_encoder2")
    checkpoint = Checkpoint.open(LITE, components=given)
    checkpoint.require_companions()
    checkpoint.require_tokenizer()
    assert set(downloads) == {LITE, QWEN}
    file = shutil.copy(hub / LITE / TRANSFORMER, tmp_path / "mine.safetensors")
    downloads.clear()
    shutil.rmtree(tmp_path / "cache")
    checkpoint = Checkpoint.open(LITE, transformer=file)
    assert checkpoint.family is KANDINSKY and checkpoint.published and checkpoint.config["model_dim"] == 128
    assert not (tmp_path / "cache").exists()


def test_diffusers_layout_holds_all(hub, downloads):
    checkpoint = Checkpoint.open(PRO)
    checkpoint.require_companions()
    checkpoint.require_tokenizer()
    assert list(downloads) == [PRO]
    missing = set(files_of(hub / PRO)) - set(files_of(downloads[PRO]))
    assert missing == {"scheduler/scheduler_config.json", *OTHERS[PRO]} - set(files_of(downloads[PRO]))
    assert OTHERS[PRO][1] in missing and "transformer/diffusion_pytorch_model.safetensors" not in missing


def test_the_command_line_runs_a_hub_id(downloads, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--frame_num 1 --sample_steps 1 --base_seed 1 --device cpu --size 128*64 --save_file out.png --prompt cat"
    assert generate.main(["--config", "kandinsky5_lite_sft_5s.yaml", *flags.split()]) == 0
    assert f"checkpoint: {LITE} on cpu" in capsys.readouterr().err and set(downloads) == {LITE, VAE, QWEN, CLIP}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """`offline(id, folder)`: the hub's cache, which may not ask the hub, with a repository in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def cached(name: str, folder: Path) -> Path:
        repository, commit = tmp_path / "cache" / f"models--{name.replace('/', '--')}", "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        return Path(shutil.copytree(folder, repository / "snapshots" / commit, copy_function=os.link))

    return cached


def test_without_the_hub_what_is_cached_is_enough(hub, offline):
    folders = {name: offline(name, hub / name) for name in (LITE, VAE, QWEN, CLIP)}
    checkpoint = Checkpoint.open(LITE)
    checkpoint.require_companions()
    checkpoint.require_tokenizer()
    assert checkpoint.folder == folders[LITE] and checkpoint.folder_of("text_encoder") == folders[QWEN]


@pytest.mark.parametrize("lost, flag", ((VAE, "--vae"), (QWEN, "--text_encoder"), (CLIP, "--text_encoder_2")))
def test_without_the_hub_what_is_not_cached_is_named_with_what_to_do(hub, offline, lost, flag):
    for name in {LITE, VAE, QWEN, CLIP} - {lost}:
        offline(name, hub / name)
    with pytest.raises(CheckpointError, match=rf"{lost}.*'hf download {lost} --local-dir DIR' and pass {flag} DIR$"):
        Checkpoint.open(LITE).require_companions()


def test_without_the_hub_and_its_cache_a_native_repository_cannot_be_had(offline):
    with pytest.raises(CheckpointError, match=f"checkpoint {LITE} is not a directory here and could not be downloaded"):
        Checkpoint.open(LITE)


def test_lite_from_a_picture_is_told_by_its_file(kandinsky_nano, tmp_path):
    folder = shutil.copytree(kandinsky_nano, tmp_path / "lite")
    (file,) = (folder / "model").iterdir()
    file.rename(file.with_name("kandinsky5lite_i2v_5s.safetensors"))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.begins_with_picture(None) and checkpoint.own_attention() is None
    checkpoint.check_kind("kandinsky5-lite-i2v")
    with pytest.raises(CheckpointError, match="the settings are for kandinsky5-lite-t2v"):
        checkpoint.check_kind("kandinsky5-lite-t2v")
