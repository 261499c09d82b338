"""The settings of training and preparation: defaults, overrides, and one clear line for every wrong one."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from training_runs import TRANSFORMER

from nabla import InputError
from wan.checkpoints import locate
from wan.config.config_files import CONFIG_FOLDER, read_settings
from wan.config.settings import SamplingSettings, VideoSettings
from wan.models.checkpoint import Checkpoint
from wan.models.wan.new_transformer import new_transformer
from wan.shapes.train_text import TextSettings
from wan.shapes.vae_settings import VaeSettings
from wan.training.config import CHANGEABLE, LoraSettings, TrainingSettings
from wan.training.export import checkpoint_defaults
from wan.training.models import add_lora, open_components
from wan.training.objective import sigmas_from_quantiles
from wan.training.prepare_settings import PrepareSettings
from wan.training.schema import with_overrides


def test_noise_levels_follow_their_distribution_and_the_shift():
    settings = TrainingSettings.from_dict(minimal()).objective
    quantiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    uniform = sigmas_from_quantiles(quantiles, type(settings)(timesteps="uniform", shift=3.0))
    assert torch.allclose(uniform, torch.tensor([0.5, 0.75, 0.9]))
    normal = torch.distributions.Normal(0.5, 2.0).icdf(quantiles).sigmoid()
    wider = type(settings)(mean=0.5, deviation=2.0, shift=1.0)
    assert torch.allclose(sigmas_from_quantiles(quantiles, wider), normal.float())


def minimal(**changes) -> dict:
    return {"mode": "finetune", "checkpoint": "any", "out": "any", "steps": 1, "data": {"train": "any"}} | changes


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"mode": ["train"]}, "mode .'train'. is not known"),
        ({"lora": True}, "lora True is not a mapping"),
        ({"mode": "train"}, "mode 'train' is not known; use one of pretrain, finetune, distill"),
        ({"step": 3}, "unknown key 'step'"),
        ({"steps": None}, "lack 'steps'"),
        ({"data": {"train": "any", "folder": "x"}}, "data has an unknown key 'folder'"),
        ({"data": "folder"}, "data 'folder' is not a mapping"),
        ({"optimizer": {"lr": -1}}, "lr -1 is not a number above 0"),
        ({"optimizer": {"betas": [0.9]}}, "betas"),
        ({"objective": {"text_dropout": 2}}, "text_dropout 2 is not a number at least 0, at most 1"),
        ({"transformer": {"num_layers": 2}}, "transformer is .* in mode pretrain"),
        ({"mode": "distill"}, "distill teaches sparse attention"),
        ({"attention": {"algorithm": "nabla-0.7", "dense_steps": 2}}, "dense_steps and mask_refresh"),
        (
            {"attention": {"algorithm": "nabla-0.7_dropped-mean"}},
            "dropped .mean. is for sampling.*leave it out of training",
        ),
        ({"attention": {"algorithm": "nabla-0.7", "dense_steps": 0.2}}, "dense_steps and mask_refresh"),
        ({"attention": {"profile": {"stretches": [{"until": 1, "keep": [0.5]}]}}}, "profile is about the steps"),
        ({"samples": {"prompts": "A cat"}}, "prompts 'A cat' are not a list"),
        ({"samples": {"sampling": {"seed": -1}}}, "seed -1 would change"),
        ({"samples": {"sampling": {"step": 3}}}, "sampling has an unknown key 'step'"),
        ({"samples": {"video": {"size": "50*32"}}}, "size 50.32: both must be positive multiples of 16"),
        ({"seed": 10**23}, r"seed 1000* is not a whole number from 0 to 2\^63-1"),
        ({"lora": {"targets": []}}, r"lora targets \[\] name no layer; leave them out"),
        ({"samples": []}, r"samples \[\] is not a mapping"),
        ({"matrix_lr": 0}, "matrix_lr 0 is not a number above 0"),
        ({"matrix_lr": 0.02, "shard": True}, "matrix_lr does not go with shard: "),
        ({"matrix_lr": 0.02, "lora": {"rank": 2}}, "matrix_lr does not go with lora: "),
        ({"micro_batch": 0}, "micro_batch 0 is not a whole number of at least 1"),
    ),
)
def test_wrong_settings_are_one_clear_line(changes, message):
    with pytest.raises(InputError, match=message):
        TrainingSettings.from_dict(minimal(**changes))


def test_samples_leave_to_the_checkpoint_what_they_do_not_say(damaged):
    own = {"sampling": {"steps": 7, "shift": 3.0, "negative_prompt": ""}, "video": {"size": [48, 32], "frame_num": 9}}
    (damaged / "defaults.yaml").write_text(yaml.safe_dump(own))
    base = Checkpoint.open(damaged)
    settings = TrainingSettings.from_dict(minimal(samples={"prompts": ["A cat"]}))
    sampling, video = settings.samples.over(own)[1:]
    assert sampling == SamplingSettings(steps=7, shift=3.0, negative_prompt="", seed=0)
    assert video == VideoSettings((48, 32), 9) and checkpoint_defaults(settings, base) == own
    settings = TrainingSettings.from_dict(minimal(samples={"sampling": {"steps": 9, "seed": 4}, "video": None}))
    assert settings.samples.over(own).sampling == SamplingSettings(steps=9, shift=3.0, negative_prompt="", seed=4)
    assert checkpoint_defaults(settings, base) == own | {"sampling": own["sampling"] | {"steps": 9}}
    assert TrainingSettings.from_dict(settings.to_dict()) == settings


def test_distillation_has_its_published_settings_by_default():
    settings = TrainingSettings.from_dict(minimal(mode="distill", steps=1600, attention={"algorithm": "nabla-0.7"}))
    own = settings.optimizer
    assert (own.lr, own.betas, own.eps, own.weight_decay, own.clip) == (1e-6, (0.9, 0.95), 1e-8, 0.0, 0.01)
    content = minimal(mode="distill", attention={"algorithm": "nabla-0.7"})
    del content["steps"]
    assert TrainingSettings.from_dict(content).steps == 1600 and settings.batch_size == 64
    assert TrainingSettings.from_dict(settings.to_dict()) == settings
    assert TrainingSettings.from_dict(minimal(every=None, attention=None, ema=None)).every.checkpoint == 200


def test_overrides_of_a_command_line():
    changed = with_overrides({"steps": 2, "optimizer": {"lr": 1}}, ["optimizer.lr=1e-4", "ema=null", "out=a=b"])
    assert changed == {"steps": 2, "optimizer": {"lr": 1e-4}, "ema": None, "out": "a=b"}
    with pytest.raises(InputError, match="'steps' is not of the form key=value"):
        with_overrides({}, ["steps"])


def test_every_config_of_training_is_right():
    files = sorted((CONFIG_FOLDER / "training").glob("*.yaml"))
    kinds = {"shapes_vae": VaeSettings, "shapes_text": TextSettings}
    assert files
    for file in files:
        kind = PrepareSettings if file.name.startswith("prepare") else kinds.get(file.stem, TrainingSettings)
        kind.from_dict(read_settings(file))


def test_the_docs_list_what_a_continuation_may_change():
    docs = (CONFIG_FOLDER.parent / "docs" / "training.md").read_text(encoding="utf-8")
    listed = docs.partition("These may change: ")[2].partition(";")[0]
    assert set(re.findall("`([a-z_]+)`", listed)) == set(CHANGEABLE)


def test_a_hub_checkpoint_that_cannot_be_had_is_named_as_training_takes_it(monkeypatch):
    monkeypatch.setattr(locate, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"pass --ckpt_dir DIR \(checkpoint=DIR to training\), or"):
        open_components("Wan-AI/Wan2.1-T2V-1.3B")


def offline(*_: object, **__: object) -> None:
    raise OSError("no network")


def test_a_new_transformer_takes_no_size_for_granted():
    with pytest.raises(InputError, match="transformer: attention_head_dim is missing; give num_attention_heads, "):
        new_transformer({"num_attention_heads": 2}, torch.device("cpu"))


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"attention_head_dim": 127}, "attention_head_dim 127 is not an even number of at least 6"),
        ({"attention_head_dim": 2}, "attention_head_dim 2 is not an even number of at least 6"),
        ({"freq_dim": 255}, "freq_dim 255 is not an even number of at least 2"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 is not a positive integer"),
        ({"num_layers": 0}, "num_layers 0 is not a positive integer"),
        ({"ffn_dim": -3}, "ffn_dim -3 is not a positive integer"),
        ({"rope_max_seq_len": None}, "rope_max_seq_len None is not a positive integer"),
        ({"out_channels": 8}, "out_channels 8 must be in_channels, 16"),
        ({"eps": "x"}, "eps 'x' is not a positive number"),
        ({"patch_size": [0, 2, 2]}, r"patch_size \[0, 2, 2\] must be \(1, 2, 2\), as in Wan2.1"),
        ({"qk_norm": "none"}, "qk_norm 'none' must be rms_norm_across_heads"),
        ({"image_dim": 5}, "image_dim 5 must be None"),
        ({"heads": 2}, "unexpected keyword argument 'heads'"),
    ),
)
def test_sizes_that_make_no_transformer_are_one_clear_line(changes, message):
    with pytest.raises(InputError, match=f"transformer: .*{message}"):
        new_transformer(TRANSFORMER | changes, torch.device("cpu"))


def test_sizes_as_a_checkpoint_names_them_make_a_transformer():
    sizes = TRANSFORMER | {"patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "image_dim": None, "eps": 1e-6}
    assert new_transformer(sizes, torch.device("cpu")).config.num_layers == 2


@pytest.mark.parametrize("target", ("norm_q", "0", "attn1", "to_x"))
def test_lora_adapts_linear_layers_alone(target):
    transformer = new_transformer(TRANSFORMER, torch.device("cpu"))
    with pytest.raises(InputError, match=f"lora target '{target}' names no linear layers alone; leave"):
        add_lora(transformer, LoraSettings(targets=["to_q", target]))


def test_components_from_elsewhere_are_paths_and_for_families_that_take_them(random_nano):
    settings = TrainingSettings.from_dict(minimal(vae="a/vae", text_encoder="someone/encoder"))
    assert settings.components == {"vae": "a/vae", "text_encoder": "someone/encoder"}
    assert TrainingSettings.from_dict(settings.to_dict()) == settings
    preparing = PrepareSettings("nano", "out", vae="a/vae")
    assert preparing.components == {"vae": "a/vae"} and "vae" not in preparing.what_decides()
    with pytest.raises(InputError, match="vae 5 is not a text"):
        TrainingSettings.from_dict(minimal(vae=5))
    with pytest.raises(InputError, match="from elsewhere is not taken for Wan;"):
        open_components(random_nano, components=settings.components)
