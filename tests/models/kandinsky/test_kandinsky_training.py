"""Training of Kandinsky-5: data, LoRA, fine-tuning and distillation at tiny sizes, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from places import PROGRAMS
from safetensors.torch import load_file
from starting import finish, fork
from training_runs import Colours, exact_rows, settings_dict, train

import wan
from nabla import InputError
from wan.models.checkpoint import Checkpoint
from wan.models.kandinsky import random_checkpoint
from wan.models.kandinsky.training import TRAINING
from wan.models.training import training_of
from wan.sampling.texts import pad_rows
from wan.training.clips import Clips
from wan.training.config import ObjectiveSettings, TrainingSettings
from wan.training.data import MicroBatches
from wan.training.encoder import Encoder
from wan.training.models import matrix_parameters, open_components
from wan.training.objective import predict_velocity
from wan.training.prepare import prepare
from wan.training.prepare_settings import PrepareSettings
from wan.training.trainer import Trainer

CPU = torch.device("cpu")
SPARSE = {"algorithm": "nabla-0.3", "tile": [1, 2, 2], "pool": [1, 1, 2]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kandinsky") / "checkpoint"
    random_checkpoint.write("kandinsky5-nano", folder, torch.float32, "diffusers")
    return folder


@pytest.fixture(scope="module")
def clips(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("clips") / "out"
    settings = PrepareSettings(str(checkpoint), str(out), clips_per_shard=3, dtype="float32")
    assert prepare(Colours(7), settings, Encoder(open_components(checkpoint), CPU)) == (7, 0)
    return out


def run_settings(checkpoint: Path, clips: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return settings_dict(checkpoint, clips, out, **{"mode": "finetune", "attention": SPARSE, "ema": None} | changes)


def test_clips_hold_states_of_both_text_encoders(clips):
    stored = load_file(clips / "shard-000000.safetensors")
    assert {name for name in stored if name.startswith("1.")} == {"1.latents", "1.text", "1.pooled"}
    assert stored["1.latents"].shape == (16, 2, 4, 6) and stored["1.text"].shape[1:] == (64,)
    assert stored["1.pooled"].shape == (32,)
    read = Clips([str(clips)], 256)
    latents, caption = read.load(1)
    rows = caption["rows"].item()
    assert torch.equal(caption["text"][:rows], stored["1.text"]) and not caption["text"][rows:].any()
    assert caption["text"].shape == (256, 64) and torch.equal(latents, stored["1.latents"])
    batch = MicroBatches(read, ObjectiveSettings(), 0, 2, 2)[0]
    assert batch.text["pooled"].shape == (2, 32) and batch.text["rows"].shape == (2,)


def test_padding_of_texts_and_other_clips_of_a_batch_change_nothing(checkpoint, clips):
    training = training_of(load(checkpoint))
    assert training is TRAINING
    transformer, read = load(checkpoint), Clips([str(clips)], 256)
    training.prepare(transformer)
    numbers = read.buckets[2, 4, 6][:2]
    batch = [read.load(number)[1] for number in numbers]
    batch[1] = read.ready({"text": torch.randn(7, 64), "pooled": torch.randn(32)})
    noise, sigmas = torch.randn(2, 16, 2, 4, 6), torch.tensor([0.3, 0.9])
    together = {name: torch.stack([one[name] for one in batch]) for name in batch[0]}
    with torch.no_grad():
        both = predict_velocity(transformer, noise, sigmas, together)
        for n, one in enumerate(batch):
            alone = {name: value[None] for name, value in one.items()}
            alone["text"] = alone["text"][:, : one["rows"]]
            assert torch.allclose(
                both[n], predict_velocity(transformer, noise[n : n + 1], sigmas[n : n + 1], alone)[0], atol=1e-5
            )


def load(folder: Path) -> torch.nn.Module:
    return TRAINING.load(TRAINING.component(Checkpoint.open(folder)), torch.float32, "cpu", None)


def test_fine_tuning_goes_on_exactly_and_leaves_a_checkpoint_with_its_attention(checkpoint, clips, tmp_path):
    samples = {"prompts": ["a cat"], "sampling": {"steps": 2}, "video": {"size": "32*32", "frame_num": 1}}
    content = run_settings(checkpoint, clips, tmp_path / "run", samples=samples, steps=4)
    rows = train(content)
    assert rows[-1]["validation_sparse"] < rows[0]["validation_sparse"] and rows[-1]["kept"] < 1
    assert (tmp_path / "run/samples/step-00000004/00-a-cat.png").is_file()
    last = Checkpoint.open(tmp_path / "run/latest/model")
    assert last.family.name == "Kandinsky-5" and last.own_attention().algorithm == "nabla-0.3_pool-1-1-2"
    assert last.own_sampling().steps == 2 and last.own_sampling().solver == "euler"
    first, trained = load(checkpoint).state_dict(), load(last.folder).state_dict()
    assert sum(not torch.equal(weight, trained[name]) for name, weight in first.items()) > len(first) / 2
    pipe = wan.from_pretrained(last.folder)
    read, texts = Clips([str(clips)], 256), "colour number 1"
    states = pipe.encode_text(*pipe.tokenize(texts))[0], pipe.encode_pooled(*pipe.tokenize_pooled(texts))[0]
    stored = read.load(1)[1]
    assert torch.allclose(pad_rows(states[0], 256), stored["text"], atol=1e-5)
    assert torch.allclose(states[1], stored["pooled"], atol=1e-5)
    longer = train(content | {"steps": 5})
    assert longer[: len(rows)] == rows


def test_lora_adapts_what_it_names_and_its_file_merges_to_what_was_trained(checkpoint, clips, tmp_path):
    content = run_settings(checkpoint, clips, tmp_path / "run", lora={"rank": 2, "alpha": 6}, optimizer={"lr": 0.01})
    rows = train(content)
    assert rows[-1]["validation_sparse"] < rows[0]["validation_sparse"]
    last = tmp_path / "run/latest/model"
    adapted = load(checkpoint)
    adapted.load_lora_adapter(last / "lora", use_safetensors=True)
    assert adapted.peft_config["default_0"].lora_alpha == 6
    adapted.fuse_lora()
    adapted.unload_lora()
    merged = load(last).state_dict()
    for name, weight in adapted.state_dict().items():
        assert torch.allclose(weight, merged[name], atol=1e-6), name
    pipe = wan.from_pretrained(checkpoint, lora=[str(last / "lora")])
    for name, weight in pipe.transformer.state_dict().items():
        assert torch.allclose(weight, merged[name], atol=1e-6), name
    blocks = len(adapted.visual_transformer_blocks)
    assert len(load_file(last / "lora/pytorch_lora_weights.safetensors")) == 2 * (10 * blocks + 6 * 2)


def test_distillation_starts_where_its_teacher_is_and_brings_sparse_nearer_to_dense(checkpoint, clips, tmp_path):
    changes = {"mode": "distill", "optimizer": {"lr": 1e-3, "warmup": 0}, "steps": 8}
    trainer = Trainer(TrainingSettings.from_dict(run_settings(checkpoint, clips, tmp_path / "run", **changes)))
    trainer.transformer.nabla.switched_off, batch = True, trainer.batches[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one, other = (
            predict_velocity(model, batch.noise, batch.sigmas, batch.text) for model in (trainer.model, trainer.teacher)
        )
    assert torch.equal(one, other)
    trainer.transformer.nabla.switched_off = False
    trainer.run()


def test_under_autocast_time_and_modulation_stay_in_float32(checkpoint, clips):
    trained, read = load(checkpoint), Clips([str(clips)], 256)
    seen: dict[str, torch.dtype] = {}
    TRAINING.prepare(trained)
    for name, module in trained.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.dtype}))
    texts = {name: value[None] for name, value in read.load(0)[1].items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predict_velocity(trained, torch.randn(1, 16, 2, 4, 4), torch.tensor([0.5]), texts)
    assert seen["time_embeddings"] == seen["visual_transformer_blocks.0.visual_modulation"] == torch.float32
    assert seen["out_layer.modulation"] == torch.float32
    assert seen["visual_transformer_blocks.1"] == seen["text_transformer_blocks.1"] == torch.bfloat16


def test_clips_of_another_family_are_refused(checkpoint, prepared, tmp_path):
    with pytest.raises(InputError, match="was prepared for Wan, and the checkpoint is of Kandinsky-5; prepare"):
        Trainer(TrainingSettings.from_dict(run_settings(checkpoint, prepared, tmp_path / "run")))


def test_a_new_transformer_is_refused(checkpoint, clips, tmp_path):
    content = run_settings(checkpoint, clips, tmp_path / "run", mode="pretrain")
    with pytest.raises(InputError, match="a new one of Kandinsky-5 cannot be made"):
        train(content)


def test_the_native_layout_is_prepared_and_trained_too(tmp_path):
    native = tmp_path / "native"
    random_checkpoint.write("kandinsky5-nano", native, torch.float32)
    settings = PrepareSettings(str(native), str(tmp_path / "clips"), dtype="float32")
    prepare(Colours(4), settings, Encoder(open_components(native), CPU))
    changes = {"attention": None, "steps": 1, "batch_size": 2, "data": {"validation": None}}
    train(run_settings(native, tmp_path / "clips", tmp_path / "run", **changes))
    model = tmp_path / "run/latest/model"
    assert Checkpoint.open(model).published is False and load(model).config.model_dim == 128
    assert (model / "tokenizer_2/tokenizer.json").is_file() and (model / "vae/config.json").is_file()


def test_muon_takes_attention_and_feed_forward_and_no_modulation(checkpoint):
    transformer = load(checkpoint)
    names = {id(weight): name for name, weight in transformer.named_parameters()}
    taken = {names[id(weight)] for weight in matrix_parameters(transformer)}
    assert len(taken) == 10 * len(transformer.visual_transformer_blocks) and not any("modulation" in n for n in taken)


def test_two_processes_train_as_one_whether_weights_are_repeated_or_sharded(checkpoint, clips, tmp_path):
    changes = {"steps": 2, "micro_batch": 1, "every": {"checkpoint": 2, "validation": 2}}
    alone = train(run_settings(checkpoint, clips, tmp_path / "alone", **changes))
    configs = []
    for name, shard in (("ddp", False), ("fsdp", True)):
        configs.append(tmp_path / f"{name}.yaml")
        content = run_settings(checkpoint, clips, tmp_path / name, **changes, shard=shard)
        configs[-1].write_text(yaml.safe_dump(content))
    code, _, said = finish(fork(2, PROGRAMS / "train_runs.py", *configs, cwd=tmp_path))
    assert code == 0, said
    for name in ("ddp", "fsdp"):
        for one, other in zip(exact_rows(tmp_path / name), alone, strict=True):
            assert one.keys() == other.keys()
            assert all(one[key] == pytest.approx(other[key], rel=1e-4) for key in one.keys() - {"kept"}), name
