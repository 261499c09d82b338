"""The public functions in diffusers' own pipelines of Kandinsky-5, as the README shows them, and LoRA of diffusers."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import wan
from nabla import InputError, NablaConfig
from wan.models.kandinsky.processor import SPARSE_PARAMS, in_raster_order
from wan.models.kandinsky.random_checkpoint import random_vae

CONFIG = NablaConfig(threshold=0.4, window=(1, 1, 1), tile=(1, 4, 4))


@pytest.fixture(scope="module")
def vae():
    return random_vae("kandinsky5-nano", torch.device("cpu"))


def transformer_of(folder, attention: str) -> Kandinsky5Transformer3DModel:
    """The tiny transformer, whose configuration says an attention of diffusers: "regular", or "nabla"."""
    return Kandinsky5Transformer3DModel.from_pretrained(folder / "transformer", attention_type=attention).eval()


def pipeline(kind, transformer, vae):
    """A pipeline without text encoders, which is given their states."""
    pipe = kind(transformer, vae, None, None, None, None, FlowMatchEulerDiscreteScheduler(shift=5.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **more) -> np.ndarray:
    draw = torch.Generator().manual_seed(1)
    given = {}
    for branch in ("prompt", "negative_prompt"):
        given[f"{branch}_embeds_qwen"] = torch.randn(1, 7, 64, generator=draw)
        given[f"{branch}_embeds_clip"] = torch.randn(1, 32, generator=draw)
        given[f"{branch}_cu_seqlens"] = torch.tensor([0, 7])
    # Six latent frames, since image to video makes the first four like those after them.
    size = {"height": 128, "width": 128, "num_frames": 21, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(0)
    frames = pipe(**given, **size, **more, generator=generator, output_type="latent").frames
    return np.asarray(frames)


PICTURE = {"image": Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))}


@pytest.mark.parametrize("kind, more", ((Kandinsky5T2VPipeline, {}), (Kandinsky5I2VPipeline, PICTURE)))
def test_attention_is_put_in_and_comes_out_without_a_trace(kandinsky_diffusers, vae, kind, more):
    pipe = pipeline(kind, transformer_of(kandinsky_diffusers, "regular"), vae)
    dense = run(pipe, **more)
    wan.apply_attention(pipe.transformer, CONFIG)
    sparse = run(pipe, **more)
    assert np.abs(sparse - dense).max() > 1e-3
    wan.apply_attention(pipe.transformer, NablaConfig(threshold=1.0, tile=CONFIG.tile))
    assert np.abs(run(pipe, **more) - dense).max() < 0.05
    wan.remove_attention(pipe.transformer)
    assert np.array_equal(run(pipe, **more), dense)


@pytest.mark.parametrize("kind, more", ((Kandinsky5T2VPipeline, {}), (Kandinsky5I2VPipeline, PICTURE)))
def test_a_configuration_that_says_nabla_runs_the_given_attention_in_its_place(kandinsky_diffusers, vae, kind, more):
    made = {}
    for attention in ("regular", "nabla"):
        pipe = pipeline(kind, transformer_of(kandinsky_diffusers, attention), vae)
        for name, config in (("sparse", CONFIG), ("dense", NablaConfig())):
            wan.apply_attention(pipe.transformer, config)
            made[attention, name] = run(pipe, **more)
    for name in ("sparse", "dense"):
        assert np.array_equal(made["regular", name], made["nabla", name])
    assert not np.array_equal(made["nabla", "sparse"], made["nabla", "dense"])


def test_arguments_by_place_are_meant_too():
    names = list(inspect.signature(Kandinsky5Transformer3DModel.forward).parameters)[1:]
    assert names[SPARSE_PARAMS] == "sparse_params"
    assert in_raster_order(tuple(range(9)), {}) == ((0, 1, 2, 3, 4, 5, 6, None, 8), {})
    assert in_raster_order((1,), {"sparse_params": {}, "x": 2}) == ((1,), {"sparse_params": None, "x": 2})


def test_a_compiled_transformer(kandinsky_diffusers, vae):
    pipe = pipeline(Kandinsky5T2VPipeline, transformer_of(kandinsky_diffusers, "nabla"), vae)
    wan.apply_attention(pipe.transformer, CONFIG)
    eager = run(pipe)
    whole = pipe.transformer
    pipe.transformer = torch.compile(whole, backend="eager")
    assert np.abs(run(pipe) - eager).max() < 1e-3
    # Through the wrapper, as it is put in.
    wan.remove_attention(pipe.transformer)
    assert not hasattr(whole, "nabla")


TARGETS = r".*_blocks\.\d+\.(self_attention|cross_attention|feed_forward)\.\w+_(query|key|value|layer)"


def adapted(folder, file, seed: int):
    """The tiny transformer with a LoRA of random factors that is saved by diffusers' own method, and its folder."""
    transformer = transformer_of(folder, "regular")
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS), adapter_name="style")
    draw = torch.Generator().manual_seed(seed)
    for name, weight in transformer.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=draw)
    transformer.save_lora_adapter(file, adapter_name="style")
    return transformer


def own_state(transformer) -> dict[str, torch.Tensor]:
    """The weights with the LoRA merged by peft, by the names that they have without it."""
    transformer.fuse_lora(adapter_names=["style"])
    state = transformer.state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if "lora_" not in name}


def test_lora_of_diffusers_is_merged_as_peft_merges_it(kandinsky_diffusers, kandinsky_nano, tmp_path):
    exact = own_state(adapted(kandinsky_diffusers, tmp_path / "one", seed=0))
    plain = transformer_of(kandinsky_diffusers, "regular").state_dict()
    file = next((tmp_path / "one").iterdir())
    for folder in (kandinsky_diffusers, kandinsky_nano):
        merged = wan.from_pretrained(folder, lora=[str(file)]).transformer.state_dict()
        assert sum(not torch.equal(merged[name], plain[name]) for name in exact) > 40
        for name, tensor in exact.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_several_add_up_by_their_scales_whatever_their_names(kandinsky_diffusers, tmp_path):
    files, changes = [], []
    plain = transformer_of(kandinsky_diffusers, "regular").state_dict()
    for seed, prefix in enumerate(("transformer.", "base_model.model.", "diffusion_model.")):
        state = own_state(adapted(kandinsky_diffusers, tmp_path / str(seed), seed))
        changes.append({name: state[name] - plain[name] for name in plain})
        # As diffusers' pipelines, peft and ComfyUI name them; the alpha, twice the rank, is lost with the header.
        tensors = load_file(next((tmp_path / str(seed)).iterdir()))
        files.append(tmp_path / f"{seed}.safetensors")
        save_file({prefix + name: 2**0.5 * tensor for name, tensor in tensors.items()}, files[-1])
    scales = 1.0, -0.5, 0.25
    merged = wan.from_pretrained(kandinsky_diffusers, lora=[f"{file}:{scale}" for file, scale in zip(files, scales)])
    for name, tensor in merged.transformer.state_dict().items():
        exact = plain[name] + sum(scale * change[name] for scale, change in zip(scales, changes))
        torch.testing.assert_close(tensor, exact, rtol=1e-5, atol=1e-5)


def test_the_pipelines_of_diffusers_load_and_save_what_we_read(kandinsky_diffusers, vae, tmp_path):
    transformer = adapted(kandinsky_diffusers, tmp_path / "one", seed=0)
    layers = get_peft_model_state_dict(transformer, adapter_name="style")
    Kandinsky5T2VPipeline.save_lora_weights(tmp_path / "pipe", transformer_lora_layers=layers)
    exact = own_state(transformer)
    saved = next((tmp_path / "pipe").iterdir())
    # Without the header's alpha, which is twice the rank.
    merged = wan.from_pretrained(kandinsky_diffusers, lora=[f"{saved}:2"]).transformer.state_dict()
    for name, tensor in exact.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def lora(file: Path, layer: str) -> Path:
    save_file({f"{layer}.lora_{kind}.weight": torch.ones(4, 4) for kind in "AB"}, file)
    return file


@pytest.mark.parametrize(
    "layer, what",
    (
        ("diffusion_model.blocks.0.self_attn.q", "is a LoRA of Wan"),
        ("transformer.blocks.0.attn1.to_q", "is a LoRA of Wan"),
        ("lora_unet_blocks_0_ffn_0", "is a LoRA of Wan"),
        ("model.layers.0.self_attn.q_proj", "is a LoRA of a text encoder"),
        (
            "transformer.single_blocks.0.linear1",
            ": 0 of 2 weights match the transformer, not for example 'transformer.",
        ),
    ),
)
def test_lora_of_other_models(kandinsky_nano, tmp_path, layer, what):
    file = lora(tmp_path / "style.safetensors", layer)
    with pytest.raises(InputError, match=f"^lora {file}( {what}|{what}).*Kandinsky-5"):
        wan.from_pretrained(kandinsky_nano, lora=[str(file)])


def test_wan_names_a_lora_of_kandinsky(random_nano, tmp_path):
    file = lora(tmp_path / "style.safetensors", "transformer.visual_transformer_blocks.0.self_attention.to_query")
    with pytest.raises(InputError, match="is a LoRA of Kandinsky-5, which is not read: .*; use one made for the kind"):
        wan.from_pretrained(random_nano, lora=[str(file)])
