"""Prompts written out by the language model: what it is given, what it writes, and what is loaded for it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from places import DATA
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

import generate
import wan
from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError
from wan.config.settings import resolve
from wan.memory.options import LoadOptions
from wan.memory.planner import MemoryPlan
from wan.models.checkpoint import Checkpoint
from wan.models.kandinsky import expand, published, random_checkpoint
from wan.models.kandinsky.components import writer_component
from wan.models.kandinsky.memory import weigh_run
from wan.models.kandinsky.random_text import QwenSizes, qwen_config

PLAN = MemoryPlan(None, None, True, 0, 3, "stream", 1, False, {"sampling": 0}, 0, 1.0)
KEYS = json.loads((DATA / "kandinsky5_keys.json").read_text(encoding="utf-8"))
PROMPT = "A red ball rolls."
WORDS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In diffusers' layout, whose checkpoints may begin with a picture."""
    folder = tmp_path_factory.mktemp("checkpoint") / "nano"
    random_checkpoint.write("kandinsky5-nano", folder, torch.float32, layout="diffusers")
    return folder


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    monkeypatch.setattr(expand, "MOST_TOKENS", WORDS)


@pytest.fixture(scope="module")
def pipe(folder):
    return wan.from_pretrained(folder, expand_prompt=True)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def test_the_text_is_what_transformers_own_loading_of_the_files_writes(pipe, folder, picture):
    there = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    there.config.image_token_id = pipe.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ends = pipe.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    plain = GenerationConfig(
        do_sample=False, repetition_penalty=1.05, max_new_tokens=WORDS, eos_token_id=ends, pad_token_id=ends[0]
    )
    texts = []
    for image in (None, picture):
        inputs = expand.inputs_of(pipe.expander, PROMPT, image)
        ids = there.generate(**inputs, generation_config=plain)[0, inputs["input_ids"].shape[1] :]
        assert len(ids) == WORDS
        texts.append(pipe.expand_prompt(PROMPT, image))
        assert texts[-1] == pipe.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert pipe.expand_prompt(PROMPT, None if image is None else Image.fromarray(image)) == texts[-1]
    assert texts[0] != texts[1] != pipe.expand_prompt(PROMPT, 255 - picture)


def test_the_model_is_given_the_prompt_once_and_a_token_for_four_patches(pipe, picture):
    inputs = expand.inputs_of(pipe.expander, " {text} of two cats\n", picture)
    text = pipe.tokenizer.decode(inputs["input_ids"][0])
    assert text.count('"{text} of two cats"') == 1 and "{prompt}" not in text
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]] and inputs["pixel_values"].shape == (24, 3 * 2 * 14 * 14)
    assert inputs["mm_token_type_ids"].sum() == text.count("<|image_pad|>") == 6
    large = np.zeros((3000, 3000, 3), np.uint8)
    assert expand.inputs_of(pipe.expander, PROMPT, large)["pixel_values"].shape[0] * 14**2 <= 1024**2
    with pytest.raises(InputError, match="image of 300x1 is too narrow"):
        pipe.expand_prompt(PROMPT, large[:1, :300])
    with pytest.raises(InputError, match="which stands for a picture"):
        pipe.expand_prompt("a cat <|image_pad|>", picture)


def test_pictures_are_read_as_the_checkpoint_says(pipe, folder, tmp_path, picture):
    for file in (folder / "tokenizer").iterdir():
        (tmp_path / file.name).symlink_to(file)
    said = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_pixels": 3136, "max_pixels": 10**7, "patch_size": 7}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    (tmp_path / "config.json").write_bytes((folder / "text_encoder" / "config.json").read_bytes())
    checkpoint = Checkpoint.open(folder, components={"text_encoder": str(tmp_path)})
    own = expand.make_expander(pipe.expander.model, pipe.tokenizer, checkpoint)
    white = expand.inputs_of(own, PROMPT, np.full_like(picture, 255))["pixel_values"]
    assert white.shape == (24, 3 * 2 * 14 * 14) and (white == 1).all()
    large = np.zeros((3000, 3000, 3), np.uint8)
    assert expand.inputs_of(own, PROMPT, large)["pixel_values"].shape[0] * 14**2 <= 1024**2
    for wrong in ("[]", json.dumps(said | {"image_mean": "grey"}), json.dumps(said | {"max_pixels": "all"})):
        (tmp_path / "preprocessor_config.json").write_text(wrong)
        with pytest.raises(CheckpointError, match="preprocessor_config.json is truncated or corrupt"):
            expand.make_expander(pipe.expander.model, pipe.tokenizer, checkpoint)


def test_the_leader_writes_for_all(pipe):
    for leads, own in ((True, pipe.expand_prompt(PROMPT)), (False, None)):
        processes = SimpleNamespace(is_leader=leads, broadcast_object_from_leader=lambda text: f"of the leader: {text}")
        one = SimpleNamespace(**vars(pipe) | {"distributed": processes} | ({} if leads else {"expander": None}))
        assert expand.expand(one, PROMPT, None) == f"of the leader: {own}"


def test_states_of_text_are_those_without_what_writes(pipe, folder):
    plain = wan.from_pretrained(folder)
    assert plain.expander is None
    ids = pipe.tokenize(PROMPT)
    assert torch.equal(pipe.encode_text(*ids)[0], plain.encode_text(*ids)[0])
    with pytest.raises(InputError, match="loaded with expand_prompt=True"):
        plain.expand_prompt(PROMPT)


def test_a_video_is_of_the_text_that_is_written(pipe):
    settings = dict(size=(64, 64), frame_num=1, steps=1, seed=1, guide_scale=1)
    video = pipe.generate(PROMPT, expand_prompt=True, **settings)
    assert (video == pipe.generate(pipe.expand_prompt(PROMPT), **settings)).all()
    assert (video != pipe.generate(PROMPT, **settings)).any()


def test_a_streamed_or_waiting_model_writes_and_encodes_the_same(pipe, folder, caplog):
    text, states = pipe.expand_prompt(PROMPT), pipe.encode_text(*pipe.tokenize(PROMPT))[0]
    for how in ({"plan": PLAN}, {"plan": replace(PLAN, text="gpu")}, {"offload": True}):
        other = wan.from_pretrained(folder, expand_prompt=True, **how)
        for _ in range(2):
            assert other.expand_prompt(PROMPT) == text
            assert torch.equal(other.encode_text(*other.tokenize(PROMPT))[0], states)
    assert caplog.text.count("this is slow") == 2


def test_text_alone_needs_no_vision_and_a_tied_head_no_tensor(folder):
    checkpoint = Checkpoint.open(folder)
    blind, seeing = writer_component(checkpoint, False), writer_component(checkpoint, True)
    assert blind.model.model.visual is None and not any("visual" in name for name in blind.names)
    assert seeing.weights.shapes.keys() - blind.weights.shapes.keys() == {n for n in seeing.names if "visual." in n}
    names = KEYS["qwen2.5-vl-7b"]["names"]
    own = {published.writer_name(name, sees=True, tied=False) for name in names}
    assert len(own) == len(names) and "model.visual.patch_embed.proj.weight" in own and "lm_head.weight" in own
    assert published.writer_name("lm_head.weight", sees=False, tied=True) is None
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    tied = published.writer(config | {"tie_word_embeddings": True}, dict.fromkeys(seeing.names.values(), ()), True)
    assert tied.config.tie_word_embeddings


def test_the_published_model_has_as_many_bytes_as_its_files():
    layers = {"model.language_model.layers": 28, "model.visual.blocks": 32}
    shapes = {f"{name}.{n}.any": () for name, count in layers.items() for n in range(count)}
    model = published.writer(qwen_config(QwenSizes()), shapes, sees=True)
    # As the index of its files says, in bfloat16.
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) == 16_584_333_312


@pytest.mark.parametrize(
    "change, message",
    (
        ({"depth": 3}, "depth is 3, but its files hold 2"),
        ({"num_heads": 0}, "num_heads is 0, but must be a positive integer"),
        ({"num_heads": 5}, "hidden_size is 32, which is no multiple of num_heads, 5"),
        ({"out_hidden_size": 32}, "out_hidden_size is 32, but the language model has 64"),
        ({"fullatt_block_indexes": "all"}, "fullatt_block_indexes is 'all', but must be a list"),
    ),
)
def test_a_vision_tower_that_makes_no_sense(folder, tmp_path, change, message):
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config["vision_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in (folder / "text_encoder").glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    checkpoint = Checkpoint.open(folder, components={"text_encoder": str(tmp_path)})
    with pytest.raises(CheckpointError, match=message):
        writer_component(checkpoint, True)
    writer_component(checkpoint, False)


def test_a_plan_counts_what_writes(folder, tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "first.png")
    checkpoint = Checkpoint.open(folder)
    plain = {"checkpoint": str(folder), "prompt": PROMPT, "dtype": "bfloat16"}
    text, seen = {"expand_prompt": True}, {"expand_prompt": True, "image": str(tmp_path / "first.png")}
    settings = [resolve(plain | more) for more in ({}, text, seen, text | {"expanded_prompt": "A ball."})]
    weighed = [weigh_run(checkpoint, [one]) for one in settings]
    shapes = Checkpoint.weights_of(checkpoint, "text_encoder").shapes
    vision = sum(np.prod(shape) for name, shape in shapes.items() if name.startswith("visual.")) * 2
    rest = [one.text.rest for one in weighed]
    assert rest[1] == rest[0] + 1024 * 64 * 2 and rest[2] == rest[1] + vision and rest[3] == rest[0]
    writing = [one.workloads[0].writing for one in weighed]
    assert writing[0] == writing[3] == 0 < writing[1] < writing[2]
    assert weigh_run(checkpoint, settings[:2]).text == weighed[1].text


def test_a_sharded_text_encoder_does_not_write(folder, monkeypatch):
    monkeypatch.setattr(LoadOptions, "processes_per_video", 2)
    with pytest.raises(InputError, match="t5_fsdp and expand_prompt do not work together"):
        wan.from_pretrained(folder, expand_prompt=True, t5_fsdp=True)


def test_a_run_keeps_the_text_in_its_record_and_makes_that_again(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "--frame_num 1 --sample_steps 1 --sample_guide_scale 1 --device cpu --size 64*64 --base_seed 1".split()
    own = [*small, "--ckpt_dir", str(folder)]
    (tmp_path / "prompts").write_text(
        json.dumps({"prompt": PROMPT, "name": "plain"}) + "\n"
        + json.dumps({"prompt": PROMPT, "expand_prompt": True, "name": "expanded"})
    )  # fmt: skip
    assert generate.main([*own, "--prompt_file", "prompts"]) == 0
    said = capsys.readouterr().err
    plain, expanded = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "expanded"))
    text = expanded["settings"]["expanded_prompt"]
    assert text and f"expanded prompt: {text[:3]}" in said and "expanding" in expanded["made_with"]["seconds"]
    assert not {"expand_prompt", "expanded_prompt"} & plain["settings"].keys()
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "expanded.png").read_bytes()
    assert generate.main([*own, "--prompt_file", "prompts"]) == 0
    assert "2, of which 2 are made already" in capsys.readouterr().err

    monkeypatch.setattr(expand, "expand", lambda *_: pytest.fail("it is written already"))
    assert generate.main(["--config", "expanded.json", "--device", "cpu", "--save_file", "again.png"]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["settings"] == expanded["settings"] and "expanding" not in again["made_with"]["seconds"]
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "expanded.png").read_bytes()
