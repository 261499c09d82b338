"""Random checkpoints of Kandinsky-5: the published names and shapes, and files that the libraries' own classes load."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel
from places import ROOT, TESTS
from safetensors.torch import load_file
from transformers import CLIPTextModel, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLTextModel

from nabla import InputError
from wan.config.settings import VideoSettings
from wan.models.checkpoint import Checkpoint
from wan.models.kandinsky import components, published, random_checkpoint
from wan.models.kandinsky.family import KANDINSKY
from wan.models.kandinsky.geometry import GEOMETRY
from wan.models.kandinsky.random_sizes import (
    MODELS,
    meta_transformer,
    meta_vae,
    transformer_shapes,
    vae_shapes,
    workload_for,
)
from wan.models.kandinsky.random_text import clip_config, clip_shapes, qwen_config, qwen_shapes

KEYS = json.loads((TESTS / "data" / "kandinsky5_keys.json").read_text())
NANO = "kandinsky5-nano"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=random_checkpoint.LAYOUTS)
def written(request, tmp_path_factory):
    """(layout, folder) of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    random_checkpoint.write(NANO, folder, torch.float32, request.param)
    return request.param, folder


@pytest.mark.parametrize("model", ("kandinsky5-lite", "kandinsky5-pro"))
def test_transformers_have_the_published_names_and_shapes(model):
    shapes, known = transformer_shapes(MODELS[model]), KEYS[model]
    first = {name: list(shape) for name, shape in shapes.items() if not re.search(r"_blocks\.[1-9]", name)}
    assert first == known["keys"] and len(shapes) == known["tensors"]
    assert sum(map(math.prod, shapes.values())) == known["parameters"]
    for kind in ("text", "visual"):
        found = {int(name.split(".")[1]) for name in shapes if name.startswith(f"{kind}_transformer_blocks")}
        assert found == set(range(known[f"{kind}_blocks"]))


def test_the_other_models_have_the_published_names_and_sizes():
    sizes = MODELS["kandinsky5-pro"]
    qwen = qwen_shapes(sizes.qwen)
    assert {name: list(shape) for name, shape in vae_shapes(sizes).items()} == KEYS["hunyuan-vae"]["keys"]
    first = {name for name in qwen if not re.search(r"layers\.[1-9]", name)}
    assert first == {name for name in KEYS["qwen2.5-vl-7b"]["names"] if not name.startswith("visual.")}
    assert sum(map(math.prod, qwen.values())) == 7_615_616_512
    assert sum(map(math.prod, clip_shapes(sizes.clip).values())) == 123_060_480


def test_the_libraries_load_all_parts_and_run_them(written):
    layout, folder = written
    names = random_checkpoint.FOLDERS[layout]
    place = {name: folder / names.get(name, name) for name in ("tokenizer", "tokenizer_2", "text_encoder_2")}
    text, mask = tokens(place["tokenizer"], "A red circle")
    config = Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder")
    qwen = Qwen2_5_VLTextModel(config.text_config).eval()
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    head = weights.pop("lm_head.weight")
    own = {name: tensor.float() for name, tensor in weights.items() if not name.startswith("visual.")}
    qwen.load_state_dict({name.removeprefix("model."): tensor for name, tensor in own.items()})
    clip = CLIPTextModel.from_pretrained(place["text_encoder_2"]).eval()
    bare, _ = tokens(place["tokenizer_2"], "A red circle", padding="max_length", max_length=77)
    vae = AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        states, pooled = qwen(input_ids=text, attention_mask=mask).last_hidden_state, clip(bare).pooler_output
        video = vae.decode(torch.randn(1, 16, 1, 2, 2)).sample
    assert head.shape == (config.text_config.vocab_size, config.text_config.hidden_size)
    assert states.shape == (1, text.shape[1], 64) and pooled.shape == (1, 32) and video.shape == (1, 3, 1, 16, 16)
    assert all(0.1 < x.std() < 10 for x in (states, pooled, video))
    transformer = transformer_of(layout, folder)
    velocity = forward(transformer, states, pooled)
    assert velocity.shape == (1, 2, 16, 16, 16) and 0.3 < velocity.std() < 3


def test_weights_that_are_drawn_without_files_are_those_of_the_files(written):
    layout, folder = written
    drawn = random_checkpoint.random_transformer(NANO, torch.float32, CPU)
    text, pooled = torch.randn(1, 7, 64), torch.randn(1, 32)
    there = transformer_of(layout, folder)
    assert all(torch.equal(tensor, there.state_dict()[name]) for name, tensor in drawn.state_dict().items())
    # Tables that are not saved with the weights are the same too. Sums differ in their last bits by where tensors lie
    # in memory, and diffusers makes more of that as it rounds to bfloat16.
    torch.testing.assert_close(forward(drawn, text, pooled), forward(there, text, pooled), rtol=0, atol=2e-3)
    # No modulation is left at the zeros that it begins training with.
    assert all(p.std() > 0 for n, p in drawn.named_parameters() if "modulation.out_layer.weight" in n)


def test_what_counts_stays_in_float32_and_layers_may_be_fewer():
    drawn = random_checkpoint.random_transformer(NANO, torch.bfloat16, CPU, layers=2)
    assert len(drawn.visual_transformer_blocks) == 2
    kept = {name for name, p in drawn.named_parameters() if p.dtype == torch.float32}
    norms = {name for name in kept if "query_norm" in name or "key_norm" in name}
    assert all("modulation" in name or "time_embeddings" in name for name in kept - norms)
    # Two text blocks with one attention each, two visual ones with two.
    assert len(norms) == 2 * (2 + 4) and len(kept - norms) == 4 + 2 * (1 + 2 + 2)
    velocity = forward(drawn, torch.randn(1, 7, 64).bfloat16(), torch.randn(1, 32).bfloat16())
    assert velocity.isfinite().all()


def test_models_without_files_run():
    qwen = random_checkpoint.random_text_encoder(NANO, torch.float32, CPU)
    clip = random_checkpoint.random_text_encoder_2(NANO, torch.float32, CPU)
    vae = random_checkpoint.random_vae(NANO, CPU)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert qwen(ids).last_hidden_state.isfinite().all() and clip(ids).pooler_output.isfinite().all()
        latents = vae.encode(torch.randn(1, 3, 5, 16, 16)).latent_dist.mode()
    assert latents.shape == (1, 16, 2, 2, 2)


@pytest.mark.parametrize("text", ("A red circle", "naïve 色", "", "z"))
def test_tokenizers_know_all_texts_and_end_where_clip_looks(written, text):
    layout, folder = written
    names = random_checkpoint.FOLDERS[layout]
    qwen = PreTrainedTokenizerFast.from_pretrained(folder / names.get("tokenizer", "tokenizer"))
    clip = PreTrainedTokenizerFast.from_pretrained(folder / names.get("tokenizer_2", "tokenizer_2"))
    assert qwen.decode(qwen(text).input_ids) == text
    marked = qwen(f"<|im_start|>user\n{text}<|im_end|>").input_ids
    assert [marked[0], marked[-1]] == qwen.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = clip(text, padding="max_length", max_length=77).input_ids
    end = clip.convert_tokens_to_ids("<|endoftext|>")
    assert len(ids) == 77 and ids[0] == clip.bos_token_id and max(ids) == end
    assert clip.decode(ids[1 : ids.index(end)]) == text.lower()


def test_diffusers_layout_says_what_the_published_one_does(tmp_path):
    folder = tmp_path / "checkpoint"
    random_checkpoint.write(NANO, folder, torch.bfloat16, "diffusers", sparse_algorithm="nabla-0.8_sta-11-3-5")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "Kandinsky5T2VPipeline"
    assert all((folder / name).is_dir() for name in index if not name.startswith("_"))
    said = json.loads((folder / "transformer" / "config.json").read_text())
    assert (said["attention_type"], said["attention_P"]) == ("nabla", 0.8)
    assert [said[f"attention_w{axis}"] for axis in "THW"] == [11, 3, 5]
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config.shift == 5
    assert meta_transformer(MODELS["kandinsky5-pro"], 1, MODELS["kandinsky5-pro"].algorithm).config.attention_P == 0.8


def test_the_family_knows_what_was_written(written):
    layout, folder = written
    known, said = KANDINSKY.recognise(folder), meta_transformer(MODELS[NANO]).config
    assert known.published == (layout == "published") and KANDINSKY.facts(known).heads == MODELS[NANO].heads
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}
    assert all(value == plain[key] for key, value in known.config.items() if key in plain and key[0] != "_")


def test_what_cannot_be_written_is_said_before_anything_is(tmp_path):
    write = random_checkpoint.write
    with pytest.raises(InputError, match="layout 'hub' is not known; use one of published, diffusers"):
        write(NANO, tmp_path, torch.float32, "hub")
    with pytest.raises(InputError, match="the published layout has no place for 'nabla-0.7'"):
        write(NANO, tmp_path, torch.float32, sparse_algorithm="nabla-0.7")
    with pytest.raises(InputError, match="'nabla-0.7' has no place in diffusers' layout"):
        write(NANO, tmp_path, torch.float32, "diffusers", sparse_algorithm="nabla-0.7")
    assert not any(tmp_path.iterdir())
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        write(NANO, tmp_path, torch.float32)


def test_the_script_writes_what_it_is_told(tmp_path, monkeypatch, capsys):
    def run(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["make_random_checkpoint.py", *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / "make_random_checkpoint.py"), run_name="__main__")
        return ended.value.code

    out = tmp_path / "out"
    assert run("--model", NANO, "--out", str(out), "--file_name", "kandinsky5pro_i2v_sft_5s") == 0
    (file,) = (out / "model").iterdir()
    assert file.name == "kandinsky5pro_i2v_sft_5s.safetensors"
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert run("--model", "nano", "--out", str(tmp_path / "wan"), "--layout", "diffusers") == 2
    assert "--layout diffusers and --file_name are not for nano; leave them out" in capsys.readouterr().err


def test_models_are_weighed_from_their_shapes():
    transformer, text, vae = random_checkpoint.weigh_models(MODELS["kandinsky5-pro"], torch.bfloat16)
    assert transformer.blocks == 4 + 60 and 38.6e9 < transformer.bytes(None) < 45e9
    assert text.blocks == 28 and 14e9 < text.bytes(None) < 16e9 and 0.9e9 < vae < 1e9
    video = VideoSettings((1280, 768), 121, 24, geometry=GEOMETRY)
    workload = workload_for(MODELS["kandinsky5-pro"], video, torch.bfloat16)
    assert (workload.tokens, workload.dim, workload.heads) == (31 * 48 * 80, 4096, 32)
    assert workload.decoding.size == (1280, 768) and workload.decoding.itemsize == 2


@pytest.mark.parametrize("model", MODELS)
def test_configurations_are_those_of_the_shapes(model):
    sizes = MODELS[model]
    qwen = published.renamed(qwen_shapes(sizes.qwen), published.text_encoder_name)
    clip = published.renamed(clip_shapes(sizes.clip), published.text_encoder_2_name)
    for made, shapes in (
        (published.transformer(transformer_shapes(sizes)), transformer_shapes(sizes)),
        (published.text_encoder(qwen_config(sizes.qwen), qwen), qwen),
        (published.text_encoder_2(clip_config(sizes.clip), clip), clip),
        (published.vae(meta_vae(sizes).config, vae_shapes(sizes)), vae_shapes(sizes)),
    ):
        assert {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()} == shapes


def tokens(folder, text: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    made = PreTrainedTokenizerFast.from_pretrained(folder)(text, return_tensors="pt", **options)
    return made["input_ids"], made["attention_mask"]


def transformer_of(layout: str, folder) -> Kandinsky5Transformer3DModel:
    if layout == "diffusers":
        return Kandinsky5Transformer3DModel.from_pretrained(folder / "transformer").eval()
    transformer = Kandinsky5Transformer3DModel.from_config(meta_transformer(MODELS[NANO]).config).eval()
    transformer.load_state_dict(load_file(folder / "model" / "kandinsky5lite_t2v_sft_10s.safetensors"))
    return transformer


def forward(transformer, text: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 2, 16, 16, 33, generator=generator).to(transformer.dtype)
    grid = [torch.arange(n) for n in (2, 8, 8)]
    with torch.no_grad():
        return transformer(
            latents, text, torch.tensor([500.0]), pooled, grid, torch.arange(text.shape[1]), return_dict=False
        )


def test_what_a_component_weighs_is_what_it_is_loaded_to(kandinsky_nano):
    component = components.transformer_component(Checkpoint.open(kandinsky_nano))
    weighed = component.bytes(torch.bfloat16)
    assert weighed == sum(p.nbytes for p in component.load(torch.bfloat16, "cpu").parameters())
