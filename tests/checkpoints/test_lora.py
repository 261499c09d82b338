"""LoRA as trainers write it: merged exactly, or refused in words for what it is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nabla import InputError
from wan.checkpoints.lora import read_lora
from wan.config.model_settings import LoraFile
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components, published
from wan.models.wan.names import NAMING


@pytest.fixture(scope="module")
def part(random_nano):
    return components.transformer_component(Checkpoint.open(random_nano))


@pytest.fixture(scope="module")
def base(random_nano):
    """The transformer's tensors in published names."""
    return load_file(next(random_nano.glob("*.safetensors")))


def linear(base, within=""):
    names = [name.removesuffix(".weight") for name, w in base.items() if name.endswith(".weight") and w.ndim == 2]
    return [name for name in names if name.startswith(within)]


def draw(base, layer, rank=4, seed=0):
    """A pair of factors, (rank, in) and (out, rank), for a layer."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = base[f"{layer}.weight"].shape
    return (torch.randn(rank, columns, generator=generator) / 20, torch.randn(rows, rank, generator=generator) / 20)


def merged(part, tensors, file, metadata=None):
    """The weights with a file of these tensors merged in, in published names."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, metadata)
    model = components.load_transformer(
        part, torch.float32, "cpu", adapters=[read_lora(LoraFile(str(file)), part.model, NAMING)]
    )
    rename = published.tensor_name(model)
    return {rename(name): tensor for name, tensor in model.state_dict().items()}


def check(base, got, changes):
    """That what was merged is the base and `changes`, and nothing else."""
    for name, tensor in base.items():
        torch.testing.assert_close(got[name], tensor + changes.get(name, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("within", ("", "blocks.1", "text_embedding", "head"))
def test_alphas_of_any_layers_scale_their_product(part, base, tmp_path, within):
    tensors, changes = {}, {}
    for number, layer in enumerate(linear(base, within)):
        # A resized LoRA has a rank of its own in each layer.
        rank = 1 + number % 5
        down, up = draw(base, layer, rank)
        tensors |= {f"diffusion_model.{layer}.lora_{kind}.weight": t for kind, t in (("down", down), ("up", up))}
        tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor([2.0])
        changes[f"{layer}.weight"] = 2 / rank * up @ down
    check(base, merged(part, tensors, tmp_path / "a.safetensors"), changes)


@pytest.mark.parametrize(
    "name",
    (
        "{}.lora_{}.default.weight",
        "base_model.model.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.default.weight",
        "base_model.model.{}.base_layer.lora_{}.weight",
        "model.diffusion_model.{}.lora_{}.weight",
        "transformer.{}.lora_{}.weight",
        "module.{}.lora_{}.weight",
    ),
)
def test_names_of_trainers(part, base, tmp_path, name):
    tensors, changes = {}, {}
    for layer in linear(base):
        down, up = draw(base, layer)
        tensors |= {name.format(layer, "A"): down, name.format(layer, "B"): up}
        changes[f"{layer}.weight"] = up @ down
    check(base, merged(part, tensors, tmp_path / "a.safetensors"), changes)


def test_whole_differences_in_flat_names_and_factors_of_the_patch(part, base, tmp_path):
    layer, down, up = "blocks.0.ffn.0", torch.randn(4, 16, 1, 2, 2), torch.randn(128, 4, 1, 1, 1)
    difference = torch.full_like(base[f"{layer}.weight"], 0.2)
    tensors = {
        f"lora_unet_{layer.replace('.', '_')}.diff": difference,
        "lora_unet_head_head.diff_b": torch.ones(64),
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
        "diffusion_model.patch_embedding.alpha": torch.tensor(2.0),
    }
    product = torch.einsum("or,ricxy->oicxy", up[:, :, 0, 0, 0], down)
    changes = {f"{layer}.weight": difference, "head.head.bias": 1.0, "patch_embedding.weight": product / 2}
    check(base, merged(part, tensors, tmp_path / "a.safetensors"), changes)


def test_the_alpha_of_peft_lies_beside_its_file(part, base, tmp_path, caplog):
    layer = "blocks.0.self_attn.q"
    down, up = draw(base, layer)
    tensors = {f"base_model.model.{layer}.lora_{kind}.weight": t for kind, t in (("A", down), ("B", up))}
    tensors[f"base_model.model.{layer}.lora_B.bias"] = torch.ones(128)
    file = tmp_path / "adapter_model.safetensors"
    check(base, merged(part, tensors, file), {f"{layer}.weight": up @ down, f"{layer}.bias": 1.0})
    assert "has no alpha" in caplog.text
    for config, scale in (
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 1}}, 0.25),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        check(base, merged(part, tensors, file), {f"{layer}.weight": scale * up @ down, f"{layer}.bias": scale})
    for config, message in (
        ({"use_dora": True}, "is DoRA"),
        ({"lora_alpha": "x"}, "lora_alpha .* is 'x'"),
        ({"alpha_pattern": {r"blocks\.\d+\.attn1": 1}}, "alpha_pattern .* a regular expression, which is not read"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            merged(part, tensors, file)


@pytest.mark.parametrize(
    "names, message",
    (
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "is LoHa, another method .*merge it into its base"),
        (("lokr_w1", "lokr_w2"), "is LoKr, another method"),
        (("oft_blocks",), "is OFT, another method"),
        (("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"), "2 of 3 .*which is of DoRA"),
        (("lora_down.weight", "lora_mid.weight", "lora_up.weight"), "2 of 3 .*which is of LoCon"),
    ),
)
def test_other_methods_are_named(part, base, tmp_path, names, message):
    down, up = draw(base, "blocks.0.self_attn.q")
    shapes = {"lora_A.weight": down, "lora_down.weight": down, "lora_B.weight": up, "lora_up.weight": up}
    tensors = {f"diffusion_model.blocks.0.self_attn.q.{name}": shapes.get(name, torch.ones(2, 2)) for name in names}
    with pytest.raises(InputError, match=message) as raised:
        merged(part, tensors, tmp_path / "a.safetensors")
    assert "\n" not in str(raised.value)


def test_alphas_and_names_that_make_no_sense(part, base, tmp_path):
    layer = "blocks.0.self_attn.q"
    down, up = draw(base, layer)
    pair = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    twice = {f"{layer}.lora_A.{name}.weight": down for name in ("one", "two")}
    image = {f"blocks.0.cross_attn.k_img.lora_{kind}.weight": down for kind in ("A", "B")}
    for tensors, message in (
        (pair | {f"{layer}.alpha": torch.ones(4, 4)}, r"alpha' is \(4, 4\), but an alpha must be one number"),
        (pair | {f"{layer}.alpha": torch.tensor(torch.inf)}, "values that are not finite"),
        (pair | {f"{layer}.lora_up.weight": up.to(torch.int8)}, "is torch.int8"),
        (pair | {"blocks.0.norm9.alpha": torch.ones(1)}, "2 of 3 weights match"),
        (twice, "of one layer; use a file of one LoRA"),
        (image, "is a LoRA of image-to-video, which is not read"),
    ):
        with pytest.raises(InputError, match=message):
            merged(part, tensors, tmp_path / "a.safetensors")
    for text, message in (("{", "no JSON"), ("[]", "no JSON object"), ('{"transformer.use_dora": true}', "is DoRA")):
        with pytest.raises(InputError, match=message):
            merged(part, pair, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
