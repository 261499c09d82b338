"""Models read off published tensors and configurations, and the names of tensors."""

from __future__ import annotations

import json

import kandinsky_set
import pytest
import torch
from conftest import DATA

from wan.models.kandinsky import published

KEYS = json.loads((DATA / "kandinsky5_keys.json").read_text())


def listed(name: str) -> dict[str, tuple[int, ...]]:
    """All tensors of a published transformer; the list has block 0 of each kind alone."""
    sizes, counts = KEYS[name], {"text": KEYS[name]["text_blocks"], "visual": KEYS[name]["visual_blocks"]}
    shapes = {}
    for key, shape in sizes["keys"].items():
        kind = key.partition("_transformer_blocks.0.")
        numbers = range(counts[kind[0]]) if kind[1] else [None]
        for number in numbers:
            whole = key if number is None else f"{kind[0]}_transformer_blocks.{number}.{kind[2]}"
            shapes[whole] = tuple(shape)
    return shapes


@pytest.mark.parametrize("name, tensors", (("kandinsky5-lite", 814), ("kandinsky5-pro", 1514)))
def test_published_transformers(name, tensors):
    shapes = listed(name)
    model = published.transformer(shapes)
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert own == shapes and len(own) == tensors
    assert sum(parameter.numel() for parameter in model.parameters()) == KEYS[name]["parameters"]
    for key, value in KEYS[name]["config"].items():
        assert model.config[key] == value


@pytest.mark.parametrize(
    "change, message",
    (
        ({"visual_transformer_blocks.0.self_attention.query_norm.weight": (60,)}, "no multiple of 16"),
        ({"visual_transformer_blocks.0.self_attention.query_norm.weight": None}, "is missing"),
        ({"text_embeddings.in_layer.weight": (1800, 3584)}, "model_dim is 1800, which is no multiple of"),
        ({"visual_embeddings.in_layer.weight": (1792, 128)}, "sees 32 channels and makes 16, but must see 16 or 33"),
        ({"visual_embeddings.in_layer.weight": (1792, 131)}, "no multiple of a patch"),
        ({"out_layer.out_layer.weight": (64,)}, "must have 2 axes"),
        ({"text_transformer_blocks.x.self_attention.to_query.weight": (1, 1)}, "has no number"),
        ({"visual_transformer_blocks.40.self_attention.to_query.weight": (1, 1)}, "32 is missing"),
        ({"text_embeddings.in_layer.weight": (0, 3584)}, "must be a positive integer"),
    ),
)
def test_shapes_that_make_no_sense(change, message):
    shapes = {key: shape for key, shape in (listed("kandinsky5-lite") | change).items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        published.transformer(shapes)


BUILDERS = {
    "text_encoder": (published.text_encoder, published.text_encoder_name),
    "text_encoder2": (published.text_encoder_2, published.text_encoder_2_name),
    "vae": (published.vae, str),
}


def own_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    _, state = kandinsky_set.component(folder)
    return published.renamed({name: tuple(x.shape) for name, x in state.items()}, BUILDERS[folder][1])


@pytest.mark.parametrize("folder", BUILDERS)
def test_the_sets_other_models_are_of_their_configurations(folder):
    config, _ = kandinsky_set.component(folder)
    model = BUILDERS[folder][0](config, own_shapes(folder))
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == own_shapes(folder)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_hubs_vae_and_names_of_qwen():
    config, keys = KEYS["hunyuan-vae"]["config"], KEYS["hunyuan-vae"]["keys"]
    shapes = {name: tuple(shape) for name, shape in keys.items()}
    assert {name: tuple(x.shape) for name, x in published.vae(config, shapes).state_dict().items()} == shapes
    names = KEYS["qwen2.5-vl-7b"]["names"]
    taken = {published.text_encoder_name(name) for name in names} - {None}
    assert {"embed_tokens.weight", "norm.weight", "layers.0.self_attn.q_proj.bias"} <= taken
    assert not any(name.startswith(("visual", "lm_head", "model")) for name in taken)
    newer = "model.language_model.layers.0.mlp.up_proj.weight", "model.visual.blocks.0.norm1.weight"
    assert [published.text_encoder_name(name) for name in newer] == ["layers.0.mlp.up_proj.weight", None]


def test_older_flat_configurations_and_whole_clip_ones():
    nested, _ = kandinsky_set.component("text_encoder")
    rotary = {"rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
    flat = {key: value for key, value in nested["text_config"].items() if key != "rope_parameters"} | rotary
    made = [published.text_encoder(one, own_shapes("text_encoder")) for one in (nested, flat)]
    for model in made:
        published.finish_text_encoder(model, "cpu")
        assert model.config.rope_parameters["rope_theta"] == 1000000.0
    assert torch.equal(made[0].rotary_emb.inv_freq, made[1].rotary_emb.inv_freq)
    clip, _ = kandinsky_set.component("text_encoder2")
    whole = {"model_type": "clip", "text_config": clip, "vision_config": {"hidden_size": 7}}
    assert published.text_encoder_2(whole, own_shapes("text_encoder2")).config.hidden_size == 32


@pytest.mark.parametrize(
    "folder, change, message",
    (
        ("text_encoder", {"model_type": "llama"}, "model_type is 'llama', but must be 'qwen2_5_vl'"),
        ("text_encoder", {"text_config": 3}, "text_config is 3"),
        ("text_encoder2", {"num_hidden_layers": 3}, "num_hidden_layers is 3, but its files hold 2"),
        ("text_encoder2", {"hidden_size": -1}, "hidden_size is -1"),
        ("text_encoder2", {"num_attention_heads": 5}, "no multiple of num_attention_heads"),
        ("vae", {"block_out_channels": [4, 4, 8, 9]}, "block_out_channels is 9"),
        ("vae", {"scaling_factor": 0}, "scaling_factor is 0"),
        ("vae", {"temporal_compression_ratio": 8}, "compression ratios"),
        ("vae", {"down_block_types": ["X"]}, "down_block_types"),
    ),
)
def test_configurations_that_make_no_sense(folder, change, message):
    config, _ = kandinsky_set.component(folder)
    with pytest.raises(ValueError, match=message):
        BUILDERS[folder][0](config | change, own_shapes(folder))
