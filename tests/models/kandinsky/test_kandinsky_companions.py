"""Kandinsky-5's components from elsewhere than the checkpoint, and which of several transformers runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import generate
import wan
from nabla import InputError
from wan import Checkpoint, CheckpointError

SMALL = (
    "--frame_num 1 --sample_steps 1 --device cpu --size 128*64 --base_seed 1 --save_file out.png --prompt cat".split()
)
FOLDERS = {"vae": "vae", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder2"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run generate.py in an empty directory: `run(*flags)` -> (exit code, what it printed, settings of the video)."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")

    def run(*flags: object):
        code = generate.main([*SMALL, *map(str, flags)])
        made = json.loads(Path("out.json").read_text())["settings"] if Path("out.json").exists() else None
        return code, capsys.readouterr().err, made

    return run


@pytest.fixture
def bare(kandinsky_nano, tmp_path):
    """A native repository as it is published: a transformer alone."""
    return Path(shutil.copytree(kandinsky_nano / "model", tmp_path / "bare" / "model")).parent


@pytest.fixture
def several(kandinsky_nano, tmp_path):
    """A native folder with two transformers, of which one was published as a distilled one, and is of other weights."""
    folder = Path(shutil.copytree(kandinsky_nano, tmp_path / "several"))
    state = load_file(folder / "model/kandinsky5lite_t2v_sft_10s.safetensors")
    other = {name: 0.5 * tensor for name, tensor in state.items()}
    save_file(other, folder / "model/kandinsky5lite_t2v_distilled16steps_5s.safetensors")
    return folder


def test_of_several_transformers_one_is_to_be_named_before_anything_is_had(run, several):
    shutil.rmtree(several / "vae")
    code, said, made = run("--ckpt_dir", several)
    assert (code, made) == (2, None)
    assert said == (
        f"error: {several} holds several transformers (kandinsky5lite_t2v_distilled16steps_5s.safetensors, "
        "kandinsky5lite_t2v_sft_10s.safetensors); name one with --transformer FILE\n"
    )


def test_the_named_transformer_brings_its_attention_and_defaults(run, several):
    made = {}
    for name in ("distilled16steps_5s", "sft_10s"):
        file = several / "model" / f"kandinsky5lite_t2v_{name}.safetensors"
        settings = Checkpoint.open(several, file).resolve({"transformer": str(file)}, needs_prompt=False)
        made[name] = settings.attention.algorithm, settings.sampling.steps, settings.video.frame_num
        code, said, record = run("--ckpt_dir", several, "--transformer", file, "--overwrite")
        assert code == 0 and f"transformer: {file}" in said and record["transformer"] == str(file)
    assert made == {"distilled16steps_5s": ("dense", 16, 121), "sft_10s": ("nabla-0.9_sta-11-3-3", 50, 241)}


def test_a_transformer_and_its_sizes_may_come_from_elsewhere(several, tmp_path, kandinsky_nano):
    file = several / "model/kandinsky5lite_t2v_distilled16steps_5s.safetensors"
    elsewhere = shutil.move(file, tmp_path / "mine.safetensors")
    pipe = wan.from_pretrained(several, transformer=elsewhere)
    kept = wan.from_pretrained(several)
    name = "visual_transformer_blocks.0.self_attention.to_query.weight"
    own, plain = (one.transformer.state_dict()[name] for one in (pipe, kept))
    assert torch.equal(own, 0.5 * plain) and (pipe.sampling.steps, pipe.video.frame_num) == (50, 121)
    # All that a folder lacks may be the transformer.
    shutil.rmtree(several / "model")
    assert torch.equal(wan.from_pretrained(several, transformer=elsewhere).transformer.state_dict()[name], own)
    with pytest.raises(CheckpointError, match="config.json is missing|may be given as --transformer"):
        wan.from_pretrained(several)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("layout", ("native", "diffusers"))
def test_a_component_or_what_has_it_stands_in_for_the_checkpoints(
    bare, kandinsky_nano, kandinsky_diffusers, name, layout
):
    other = kandinsky_nano if layout == "native" else kandinsky_diffusers
    own = other / (FOLDERS[name] if layout == "native" else name)
    for given in (own, other):
        checkpoint = Checkpoint.open(bare, components=dict.fromkeys(FOLDERS, str(kandinsky_nano)) | {name: str(given)})
        assert checkpoint.folder_of(name) == own
        checkpoint.require_tokenizer()
    # The checkpoint's own is left alone.
    assert Checkpoint.open(kandinsky_nano, components={name: str(own)}).folder_of(name) == own


def test_flags_keys_and_arguments_mean_the_same(run, bare, kandinsky_nano, tmp_path, monkeypatch):
    given = {name: str(kandinsky_nano / folder) for name, folder in FOLDERS.items()}
    code, _, made = run("--ckpt_dir", bare, *(word for name in given for word in (f"--{name}", given[name])))
    assert code == 0 and {name: made[name] for name in given} == given
    picture = Path("out.png").read_bytes()
    # From its record, from elsewhere, and with paths of the working directory.
    monkeypatch.chdir(kandinsky_nano)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FOLDERS | {"checkpoint": str(bare)}))
    for config in (tmp_path / "out/out.json", tmp_path / "config.yaml"):
        again = tmp_path / f"{config.stem}.png"
        assert generate.main([*SMALL[:-4], "--prompt", "cat", "--config", str(config), "--save_file", str(again)]) == 0
        assert again.read_bytes() == picture
        assert json.loads(again.with_suffix(".json").read_text())["settings"] == made
    pipes = wan.from_pretrained(kandinsky_nano), wan.from_pretrained(bare, **dict.fromkeys(FOLDERS, kandinsky_nano))
    videos = [pipe.generate("cat", size=(128, 64), frame_num=1, steps=1, seed=1) for pipe in pipes]
    assert (videos[0] == videos[1]).all()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_none_of_a_component(run, bare, kandinsky_nano, tmp_path, name):
    whole = [word for one in FOLDERS if one != name for word in (f"--{one}", kandinsky_nano)]
    (tmp_path / "empty").mkdir()
    for given, message in (
        (
            tmp_path / "empty",
            f"has no config.json and so is no {name} of Kandinsky-5; give the folder of one as --{name}",
        ),
        ("/no/such/folder", f"{name} '/no/such/folder' is neither a directory nor a hub id"),
        (kandinsky_nano / "vae/config.json", f"is a file; give the folder that it lies in as --{name}"),
        (kandinsky_nano / ("text_encoder" if name == "vae" else "vae"), ""),
    ):
        code, said, made = run("--ckpt_dir", bare, *whole, f"--{name}", given)
        assert (code, made) == (2, None) and said.count("\n") == 1 and message in said, said


@pytest.mark.parametrize("name", FOLDERS)
def test_wan_takes_none(run, random_nano, kandinsky_nano, name):
    code, said, _ = run("--ckpt_dir", random_nano, f"--{name}", kandinsky_nano)
    assert (code, said) == (2, f"error: {name} from elsewhere is not taken for Wan; leave it out\n")
    with pytest.raises(InputError, match=f"^{name} from elsewhere is not taken for Wan;"):
        wan.from_pretrained(random_nano, **{name: kandinsky_nano})


@pytest.fixture
def older(kandinsky_diffusers, tmp_path):
    """A checkpoint whose CLIP has a vocabulary and merges in place of a `tokenizer.json`, as older libraries saved."""
    folder = Path(shutil.copytree(kandinsky_diffusers, tmp_path / "older"))
    config = json.loads((folder / "text_encoder_2/config.json").read_text())
    end = config.get("text_config", config)["eos_token_id"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>"]
    ids = {word: number for number, word in enumerate(words)} | {"<|startoftext|>": end - 1, "<|endoftext|>": end}
    place = folder / "tokenizer_2"
    (place / "tokenizer.json").unlink()
    (place / "vocab.json").write_text(json.dumps(ids))
    (place / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **marks}))
    return folder


def test_clip_reads_prompts_by_a_vocabulary_and_merges(run, older):
    assert run("--ckpt_dir", older)[0] == 0
    pipe = wan.from_pretrained(older)
    ids, mask = pipe.tokenize_pooled("A  cat")
    begin, a, cat, end = ids[0, :4].tolist()
    assert mask[0].sum() == 4 and (a, cat, begin) == (26, 53, end - 1)
    assert ids.shape == (1, 77) and (ids[0, 3:] == end).all()
    assert pipe.tokenize_pooled("cat " * 100)[0][0, [0, -1]].tolist() == [begin, end]
    (older / "tokenizer_2" / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="tokenizer_2/tokenizer.json is missing"):
        wan.Checkpoint.open(older).require_tokenizer()
