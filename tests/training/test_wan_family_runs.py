"""Training runs of Wan's other kinds at tiny sizes: their losses by hand, what they leave, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_runs import Moving, family_settings, prepare_clips
from safetensors.torch import load_file
from training_runs import train
from wan_family_sets import with_tokenizer

import wan
from nabla import InputError
from wan.checkpoints.file_errors import read_json_object
from wan.checkpoints.lora import read_lora
from wan.config.config_files import read_settings
from wan.config.model_settings import LoraFile
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.image_encoder import image_encoder_component, load_image_encoder
from wan.models.wan.names import NAMING
from wan.training.clips import Clips
from wan.training.config import TrainingSettings
from wan.training.data import Draw, MicroBatches
from wan.training.encoder import Encoder
from wan.training.models import open_components
from wan.training.prepare import prepare
from wan.training.prepare_settings import PrepareSettings
from wan.training.shards import read_shard_metadata
from wan.training.trainer import Trainer

CPU = torch.device("cpu")
TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
SIZES = {"ti2v_5b": {"size": (64, 32), "frames": 5}}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Callable[[str], Path]:
    """From a task to its checkpoint with a tokenizer."""
    made: dict[str, Path] = {}

    def get(task: str) -> Path:
        if task not in made:
            made[task] = with_tokenizer(task, tmp_path_factory.mktemp("base") / task)
        return made[task]

    return get


@pytest.fixture(scope="module")
def clips(base, tmp_path_factory) -> Callable[[str], Path]:
    """From a task to four clips prepared for it."""
    made: dict[str, Path] = {}

    def get(task: str) -> Path:
        if task not in made:
            made[task] = prepare_clips(base(task), tmp_path_factory.mktemp("clips") / task, **SIZES.get(task, {}))
        return made[task]

    return get


def trainer_of(content: dict) -> Trainer:
    return Trainer(TrainingSettings.from_dict(content))


def transformer_of(folder: Path, expert: str | None = None) -> torch.nn.Module:
    component = components.transformer_component(Checkpoint.open(folder), None, expert)
    return components.load_transformer(component, torch.float32, "cpu")


def expert_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for file in (folder / name).glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "expert, low, high, own, other",
    (("high", 875, 1000, "transformer", "transformer_2"), ("low", 0, 875, "transformer_2", "transformer")),
)
def test_one_of_two_experts_is_fine_tuned_at_its_own_timesteps(base, clips, tmp_path, expert, low, high, own, other):
    content = family_settings(base("wan22_t2v"), clips("wan22_t2v"), tmp_path / "run", expert=expert)
    trainer = trainer_of(content)
    timesteps = [1000 * trainer.batches.draw(step, 0).sigma.item() for step in range(200)]
    assert low <= min(timesteps) and high - 30 < max(timesteps) <= high
    trainer.run()
    trainer.close()
    written = Checkpoint.open(tmp_path / "run" / "latest" / "model")
    assert (written.kind, written.boundary) == ("t2v-A14B", 0.875)
    before = {name: transformer_of(base("wan22_t2v"), name).state_dict() for name in ("high", "low")}
    after = {name: transformer_of(written.folder, name).state_dict() for name in ("high", "low")}
    left = "low" if expert == "high" else "high"
    assert all(torch.equal(before[left][name], after[left][name]) for name in before[left])
    assert not torch.equal(before[expert]["blocks.0.attn1.to_q.weight"], after[expert]["blocks.0.attn1.to_q.weight"])
    assert (written.folder / other).is_symlink() and (written.folder / own / TRANSFORMER_FILE).is_file()


def test_a_lora_of_an_expert_is_for_that_one(base, clips, tmp_path):
    content = family_settings(
        base("wan22_t2v"), clips("wan22_t2v"), tmp_path / "run", expert="low", lora={"rank": 2, "alpha": 4}
    )
    train(content)
    last = tmp_path / "run" / "latest" / "model"
    adapted = transformer_of(base("wan22_t2v"), "low")
    adapted.load_lora_adapter(last / "lora", use_safetensors=True)
    adapted.fuse_lora()
    adapted.unload_lora()
    merged = transformer_of(last, "low").state_dict()
    for name, tensor in adapted.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)
    plain = transformer_of(base("wan22_t2v"), "low").state_dict()
    assert not torch.equal(merged["blocks.1.attn2.to_v.weight"], plain["blocks.1.attn2.to_v.weight"])
    # As generate.py reads it.
    given = LoraFile.parse(f"low:{last}")
    assert given.expert == "low"
    _check_lora(base("wan22_t2v"), given, merged)


def _check_lora(base: Path, given: LoraFile, merged: dict[str, torch.Tensor]) -> None:
    component = components.transformer_component(Checkpoint.open(base), None, given.expert)
    adapters = [read_lora(given, component.model, NAMING)]
    ours = components.load_transformer(component, torch.float32, "cpu", adapters=adapters).state_dict()
    assert ours.keys() == merged.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)


def test_a_video_is_made_with_an_expert_however_it_is_given(base, clips, tmp_path):
    plain = base("wan22_t2v")
    train(family_settings(plain, clips("wan22_t2v"), tmp_path / "run", expert="low", lora={"rank": 2}, steps=1))
    last = tmp_path / "run" / "latest" / "model"
    file = last / "transformer_2" / TRANSFORMER_FILE

    def video(folder: Path, **given: Any) -> np.ndarray:
        pipe = wan.from_pretrained(folder, device="cpu", dtype=torch.float32, **given)
        return pipe.generate("clip number 3", size=(32, 32), frame_num=5, seed=0, steps=3).astype(int)

    whole = video(last)
    assert abs(video(plain) - whole).mean() > 1
    for given in ({"lora": [f"low:{last}"]}, {"transformer": f"low:{file}"}):
        assert abs(video(plain, **given) - whole).max() <= 1


@pytest.mark.parametrize("task, last", (("i2v", False), ("flf2v", True), ("wan22_i2v", False)))
def test_clips_hold_what_the_pipeline_makes_of_their_own_pictures(base, clips, task, last):
    pipe = wan.from_pretrained(base(task), device="cpu", dtype=torch.float32)
    if pipe.sees_states:
        pipe.image_encoder = load_image_encoder(image_encoder_component(Checkpoint.open(base(task))), CPU)
    read = Clips([str(clips(task))], 512)
    for number, clip in enumerate(read.clips):
        video, _ = Moving(4)[clip.index]
        pictures = {"image": video[0], "last_image": video[-1]} if last else {"image": video[0]}
        condition = pipe.condition(**pictures, size=(32, 32), frame_num=5)
        _, seen = read.load(number)
        torch.testing.assert_close(seen["given"], condition.y, atol=1e-4, rtol=0)
        if condition.clip is None:
            assert "pictures" not in seen
        else:
            torch.testing.assert_close(seen["pictures"], condition.clip, atol=1e-4, rtol=0)


def test_clips_too_short_for_two_pictures_are_skipped_and_named(base, tmp_path):
    settings = PrepareSettings(str(base("flf2v")), str(tmp_path / "out"))
    encoder = Encoder(open_components(base("flf2v")), CPU)
    assert prepare(Moving(1, frames=1), settings, encoder) == (0, 1)
    _, skipped = read_shard_metadata(tmp_path / "out" / "shard-000000.safetensors")
    assert skipped == [{"index": 0, "reason": "its frames are 1, and have to be 5 or more"}]


def slow_loss(transformer: torch.nn.Module, task: str, stored: dict[str, torch.Tensor], draw: Draw) -> float:
    """Of one clip, of its stored tensors and the null caption, as what is drawn of it says."""
    latents, sigma, gives = stored["latents"], draw.sigma.item(), draw.gives_first_frame
    noise = torch.randn(latents.shape, generator=draw.generator)
    noisy, timestep = (1 - sigma) * latents + sigma * noise, torch.tensor([1000 * sigma])
    if gives:
        noisy[:, 0] = latents[:, 0]
        tokens = latents.shape[2] * latents.shape[3] // 4
        timestep = torch.tensor([[0.0] * tokens + [1000 * sigma] * tokens * (latents.shape[1] - 1)])
    text = stored["null" if draw.drops_caption else "text"]
    text = torch.cat((text, torch.zeros(512 - len(text), text.shape[1])))[None]
    if task != "ti2v_5b":
        mask = torch.zeros(4, *latents.shape[1:])
        mask[:, 0] = 1
        if task == "flf2v":
            mask[3, -1] = 1
        noisy = torch.cat((noisy, mask, stored["given"]))
    with torch.no_grad():
        out = transformer(noisy[None], timestep, text, encoder_hidden_states_image=stored.get("pictures"))
    errors = (out.sample[0] - (noise - latents)).square()
    return (errors[:, 1:] if gives else errors).mean().item()


@pytest.mark.parametrize("task, expert", (("i2v", None), ("flf2v", None), ("wan22_i2v", "high"), ("ti2v_5b", None)))
def test_losses_are_those_of_a_slow_computation(base, clips, tmp_path, task, expert):
    objective = {"first_frame": 0.5, "text_dropout": 0.5} if task == "ti2v_5b" else {"text_dropout": 0.5}
    changes = {"objective": objective, "expert": expert, "seed": 3, "steps": 3}
    # So slow that all steps are of the transformer that it starts from.
    content = family_settings(
        base(task), clips(task), tmp_path / "run", optimizer={"lr": 1e-12, "warmup": 0}, **changes
    )
    rows = train(content)
    own = TrainingSettings.from_dict(read_settings(tmp_path / "run" / "settings.yaml"))
    batches = MicroBatches(Clips([str(clips(task))], 512), own.objective, own.seed, 2, 2)
    transformer = transformer_of(base(task), expert)
    shards = {key: value for file in clips(task).glob("shard-*") for key, value in load_file(file).items()}
    null = load_file(clips(task) / "dropped.safetensors")["text"]
    seen = set()
    for step in range(3):
        losses = []
        for place, number in enumerate(batches.numbers(step)):
            draw, start = batches.draw(step, place), f"{batches.clips.clips[number].index}."
            seen |= {("dropped", draw.drops_caption), ("first", draw.gives_first_frame)}
            stored = {key.removeprefix(start): value for key, value in shards.items() if key.startswith(start)}
            losses.append(slow_loss(transformer, task, stored | {"null": null}, draw))
        assert rows[step + 1]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert {("dropped", True), ("dropped", False)} <= seen
    assert task != "ti2v_5b" or {("first", True), ("first", False)} <= seen


@pytest.mark.parametrize("task", ("i2v", "flf2v", "ti2v_5b"))
def test_a_trained_checkpoint_is_one_of_its_kind(base, clips, tmp_path, task):
    changes = {"objective": {"first_frame": 0.5}} if task == "ti2v_5b" else {}
    rows = train(family_settings(base(task), clips(task), tmp_path / "run", steps=1, **changes))
    assert len(rows) == 2 and all(np.isfinite(row["validation_dense"]) for row in rows)
    folder = tmp_path / "run" / "latest" / "model"
    kind = Checkpoint.open(base(task)).kind
    assert Checkpoint.open(folder).kind == kind
    before, after = transformer_of(base(task)).state_dict(), transformer_of(folder).state_dict()
    assert before.keys() == after.keys()
    changed = "blocks.0.attn2.add_k_proj.weight" if task != "ti2v_5b" else "patch_embedding.weight"
    assert not torch.equal(before[changed], after[changed])


def test_samples_begin_with_pictures_of_the_clips(base, clips, tmp_path):
    import imageio.v3 as iio

    samples = {"prompts": ["clip number 3"], "sampling": {"steps": 1, "guide_scale": 2.0}}
    content = family_settings(base("i2v"), clips("i2v"), tmp_path / "run", steps=1, samples=samples, lora={"rank": 2})
    train(content)
    (video,) = (tmp_path / "run" / "samples").glob("*/*.mp4")
    assert iio.imread(video).shape == (5, 32, 32, 3)
    named = load_file(tmp_path / "run" / "latest" / "model" / "lora" / "pytorch_lora_weights.safetensors")
    assert any(".add_k_proj." in name for name in named)
    last = tmp_path / "run" / "latest" / "model"
    _check_lora(base("i2v"), LoraFile(str(last)), transformer_of(last).state_dict())


def test_distillation_of_an_expert_is_taught_by_the_same_one(base, clips, tmp_path):
    sparse = {"algorithm": "nabla-0.5", "tile": [1, 2, 2]}
    content = family_settings(
        base("wan22_i2v"), clips("wan22_i2v"), tmp_path / "run", expert="low", mode="distill", attention=sparse
    )
    trainer = trainer_of(content)
    low = transformer_of(base("wan22_i2v"), "low").state_dict()
    teacher = trainer.teacher.state_dict()
    assert all(torch.equal(low[name], teacher[name]) for name in low)
    trainer.run()
    trainer.close()


@pytest.mark.parametrize(
    "task, changes, message",
    (
        ("wan22_t2v", {}, "has two transformers, of which a run trains one; set expert to high or low"),
        ("i2v", {"expert": "high"}, "expert 'high' is none of .*, of one transformer; leave it out"),
        ("wan22_t2v", {"expert": "high", "samples": {"prompts": ["clip"]}}, "samples: a video needs both transformers"),
        ("wan22_t2v", {"expert": "high", "objective": {"max_timestep": 800}}, "min_timestep 875 is not below max_tim"),
        ("i2v", {"objective": {"first_frame": 0.5}}, "first_frame 0.5 is for a transformer that takes a first frame"),
        ("vace", {}, "vace cannot be trained here"),
        (
            "i2v",
            {"mode": "pretrain", "transformer": {"text_len": 512}},
            "transformer: a new one begins from text alone, .*leave it out",
        ),
    ),
)
def test_what_a_kind_cannot_do_is_refused(base, clips, tmp_path, task, changes, message):
    content = family_settings(base(task), tmp_path, tmp_path / "run", **changes)
    with pytest.raises(InputError, match=message) as refused:
        trainer_of(content)
    assert "\n" not in str(refused.value)


def test_clips_of_another_kind_are_refused(base, clips, tmp_path):
    for task, data, message in (
        ("i2v", "flf2v", "was prepared for flf2v, and the checkpoint is of i2v; prepare the data with the run's"),
        ("i2v", "wan22_t2v", "was prepared for text to video, and the checkpoint is of i2v"),
        ("ti2v_5b", "wan22_t2v", "was prepared for text to video, and the checkpoint is of ti2v-5B"),
    ):
        with pytest.raises(InputError, match=message):
            trainer_of(family_settings(base(task), clips(data), tmp_path / "run"))
    with pytest.raises(InputError, match="were prepared for other kinds of checkpoints, i2v and flf2v"):
        Clips([str(clips("flf2v")), str(clips("i2v"))], 512)
    with pytest.raises(InputError, match="vace cannot be trained here"):
        Encoder(open_components(base("vace")), CPU)
    # Those of text alone say what they always did, so that old ones serve.
    assert not {"prepared_for", "beside"} & read_json_object(clips("wan22_t2v") / "prepared.json").keys()
    # A folder cannot become another kind's under way.
    with pytest.raises(InputError, match="prepared_for|other settings"):
        prepare_clips(base("i2v"), clips("flf2v"))
