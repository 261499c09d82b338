"""Checkpoints of all of Wan's kinds: what they are, told by their tensors, and that these have their place strictly."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import wan_family_sets as sets
import weight_files
from safetensors.torch import load_file, save_file

import wan
from wan import Checkpoint, CheckpointError
from wan.models.wan import published, random_checkpoint
from wan.models.wan.components import load_transformer, transformer_component
from wan.models.wan.image_encoder import image_encoder_component
from wan.models.wan.kinds import KINDS
from wan.models.wan.random_sizes import MODELS, meta_transformer
from wan.models.wan.recognise import kind_of_signs, signs_of
from wan.models.wan.vae_component import vae_component

# Names of published tables of transformers, by those of models here.
TABLES = {
    **{name: name for name in ("t2v-1.3B", "t2v-14B", "i2v-14B", "flf2v-14B", "vace-1.3B", "vace-14B")},
    **{name: f"wan2.2 {name} each expert" for name in ("t2v-A14B", "i2v-A14B")},
    "ti2v-5B": "wan2.2 ti2v-5B",
}


@pytest.mark.parametrize("task", sets.TASKS)
def test_each_set_is_of_its_kind_and_loads_strictly(task):
    checkpoint = Checkpoint.open(sets.checkpoint(task))
    kind = KINDS[sets.KIND_OF[task]]
    assert checkpoint.published and checkpoint.kind == kind.name and checkpoint.boundary == kind.boundary
    assert checkpoint.geometry == kind.geometry and checkpoint.positions == 1024 and checkpoint.heads == 2
    assert [expert for expert in (None, *kind.experts)] == (
        [None, "high", "low"] if task in sets.TWO_EXPERTS else [None]
    )
    for expert in kind.experts or (None,):
        component = transformer_component(checkpoint, expert=expert)
        model = load_transformer(component, torch.float32, "cpu")
        assert all(not parameter.is_meta for parameter in model.parameters())
        assert component.names.keys() == component.weights.shapes.keys()


def test_a_class_of_another_kind_is_refused_though_made_from_the_same():
    class Mine(wan.WanT2V):
        pass

    assert isinstance(Mine.from_pretrained(sets.checkpoint("wan22_t2v")), Mine)
    for task, wrong, right in (("i2v", Mine, "WanI2V"), ("wan22_t2v", wan.WanI2V, "WanT2V")):
        with pytest.raises(CheckpointError, match=f"which {wrong.__name__} does not run; use wan.{right}, or"):
            wrong.from_pretrained(sets.checkpoint(task))


@pytest.mark.parametrize("model", TABLES)
def test_published_names_and_shapes_are_the_models(model):
    table = sets.published_keys()[TABLES[model]]
    shapes = table["shapes"]
    own = meta_transformer(MODELS[model])
    config = published.transformer_config(own, 512)
    read = published.transformer(config, shapes)
    assert {key: value for key, value in read.config.items() if key[0] != "_"} == {
        key: value for key, value in own.config.items() if key[0] != "_"
    } | {"patch_size": read.config.patch_size}
    rename = published.tensor_name(read)
    assert {rename(name): tuple(tensor.shape) for name, tensor in read.state_dict().items()} == shapes
    assert sum(map(math.prod, shapes.values())) == table["parameters"] == own.num_parameters()
    kind = MODELS[model].kind
    assert kind_of_signs(signs_of(shapes), experts=bool(KINDS[kind].experts)) == kind


def test_the_type_that_a_vace_names_is_not_trusted(tmp_path):
    shutil.copytree(sets.checkpoint("vace"), tmp_path / "vace")
    file = tmp_path / "vace" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "t2v", "_class_name": "WanModel"}))
    assert Checkpoint.open(tmp_path / "vace").kind == "vace"


@pytest.mark.parametrize("task", sets.TASKS)
def test_configurations_alone_tell_until_tensors_are_there(task, tmp_path):
    there = sets.checkpoint(task)
    for file in there.rglob("*.json"):
        copy = tmp_path / file.relative_to(there)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)
    assert Checkpoint.open(tmp_path).kind == sets.KIND_OF[task]
    with pytest.raises(CheckpointError, match="is missing|no diffusion_pytorch_model"):
        transformer_component(Checkpoint.open(tmp_path))


def test_a_missing_expert_is_one_line(tmp_path):
    shutil.copytree(sets.checkpoint("wan22_t2v"), tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "low_noise_model")
    with pytest.raises(CheckpointError, match=r"of two transformers .*low_noise_model/config.json is missing"):
        Checkpoint.open(tmp_path / "two")
    for task, expert in (("wan22_i2v", "high_noise_model"), ("wan22_t2v", "low_noise_model")):
        with pytest.raises(CheckpointError, match="is one transformer of Wan2.2.*give the folder above"):
            Checkpoint.open(sets.checkpoint(task) / expert)
    shutil.copytree(sets.checkpoint("wan22_i2v") / "high_noise_model", tmp_path / "alone")
    with pytest.raises(CheckpointError, match="is one transformer of Wan2.2 image-to-video.*give the folder above"):
        Checkpoint.open(tmp_path / "alone")
    checkpoint = Checkpoint.open(sets.checkpoint("i2v"))
    with pytest.raises(CheckpointError, match="there is no low expert of checkpoint .* has one transformer"):
        transformer_component(checkpoint, expert="low")


def test_experts_of_two_sizes(tmp_path):
    shutil.copytree(sets.checkpoint("wan22_t2v"), tmp_path / "two")
    file = tmp_path / "two" / "low_noise_model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": 3}))
    with pytest.raises(CheckpointError, match="num_layers is 3, and 2 for the first transformer"):
        transformer_component(Checkpoint.open(tmp_path / "two"), expert="low")


@pytest.mark.parametrize(
    "config, tensor, message",
    (
        ({"model_type": "s2v"}, None, r"speech-to-video \(S2V\).*no single grid, so that tiles do not apply"),
        ({}, "audio_injector.injector.0.q.weight", "speech-to-video .*so that tiles do not apply"),
        ({"model_type": "animate"}, None, "an animation model .*wan.apply_attention"),
        ({}, "motion_encoder.enc.0.weight", "an animation model .*wan.apply_attention"),
        ({}, "control_adapter.conv.weight", "a camera or control model"),
        ({"_class_name": "AutoencoderKLWan"}, None, "is one part of a checkpoint"),
    ),
)
def test_kinds_that_are_not_read_are_said_to_be_what_they_are(tmp_path, config, tensor, message):
    there = sets.checkpoint("vace")
    shutil.copytree(there, tmp_path / "other")
    file, weights = tmp_path / "other" / "config.json", tmp_path / "other" / "diffusion_pytorch_model.safetensors"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensor is not None:
        save_file(load_file(weights) | {tensor: torch.ones(1)}, weights)
    with pytest.raises(CheckpointError, match=message) as raised:
        transformer_component(Checkpoint.open(tmp_path / "other"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("task, what", (("vace", "vace, Wan2.1 VACE"), ("ti2v_5b", "ti2v-5B, Wan2.2 TI2V-5B")))
def test_a_file_of_another_kind_is_told_with_both(tmp_path, task, what):
    files = sets.checkpoint(task).glob("diffusion_pytorch_model*.safetensors")
    save_file({name: tensor for file in files for name, tensor in load_file(file).items()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"is a transformer of {what}, and checkpoint .* is i2v-A14B"):
        transformer_component(Checkpoint.open(sets.checkpoint("wan22_i2v")), tmp_path / "a.safetensors", "high")


@pytest.mark.parametrize("model", [name for name in MODELS if name.endswith("-nano")])
def test_random_checkpoints_are_of_their_kind_and_whole(model, tmp_path):
    random_checkpoint.write(model, tmp_path / model, torch.bfloat16, "nabla-0.7")
    checkpoint, kind = Checkpoint.open(tmp_path / model), KINDS[MODELS[model].kind]
    assert checkpoint.kind == kind.name and checkpoint.own_algorithm == {"attention": {"algorithm": "nabla-0.7"}}
    for expert in kind.experts or (None,):
        transformer = load_transformer(transformer_component(checkpoint, expert=expert), torch.float32, "cpu")
        assert all(bool(parameter.isfinite().all()) for parameter in transformer.parameters())
    vae_component(checkpoint)
    if kind.sees_pictures:
        tower = image_encoder_component(checkpoint).model
        assert tower.config.hidden_size == transformer.config.image_dim
    checkpoint.require_tokenizer()
    # The same of the same seed.
    random_checkpoint.write(model, tmp_path / "again", torch.bfloat16, "nabla-0.7")
    for files in checkpoint.component_files:
        first, second = (dict(files.find(folder, True)) for folder in (tmp_path / model, tmp_path / "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_small_model_is_one_by_the_pipeline_of_pictures_too(tmp_path):
    meta_transformer(MODELS["ti2v-5B"]).save_config(tmp_path / "transformer")
    for pipeline in ("WanPipeline", "WanImageToVideoPipeline"):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        assert Checkpoint.open(tmp_path).kind == "ti2v-5B"


@pytest.mark.parametrize("is_folded", (False, True))
def test_patches_of_packed_files_are_unpacked_whatever_they_are_of(tmp_path, is_folded):
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-gguf.txt")
    state = load_file(sets.checkpoint("vace") / "diffusion_pytorch_model.safetensors")
    patches = [name for name in state if name.endswith("patch_embedding.weight")]
    given = {name: x.flatten(1) if is_folded and name in patches else x for name, x in state.items()}
    exact = weight_files.write_gguf(tmp_path / "a.gguf", given, "F32")
    component = transformer_component(Checkpoint.open(sets.checkpoint("vace")), tmp_path / "a.gguf")
    model = load_transformer(component, torch.float32, "cpu")
    for name in patches:
        own = model.get_parameter(name)
        assert torch.equal(own, exact[name].reshape(own.shape))


@pytest.mark.parametrize("task, own", (("i2v", "add_k_proj"), ("vace", "vace_blocks"), ("ti2v_5b", None)))
def test_a_lora_of_text_to_video_is_taken_and_said_to_be_one(tmp_path, caplog, task, own):
    checkpoint = Checkpoint.open(sets.checkpoint(task))
    factors = weight_files.draw_factors(transformer_component(checkpoint).model)
    plain = {name: pair for name, pair in factors.items() if not name.startswith("vace_") and ".add_" not in name}
    caplog.set_level("INFO", "wan")
    for given in (plain, factors):
        caplog.clear()
        wan.from_pretrained(checkpoint, lora=[str(weight_files.write_lora(tmp_path / "a.safetensors", given))])
        is_said = "it changes nothing of what sees" in caplog.text
        assert is_said == (own is not None and not any(own in name for name in given))
