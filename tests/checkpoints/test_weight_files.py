"""LoRA and single-file transformers: each gives exactly what its weights, merged or unpacked by hand, give."""

from __future__ import annotations

import json

import pytest
import torch
import weight_files
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

import wan
from nabla import InputError
from wan.checkpoints.lora import read_lora
from wan.config.model_settings import LoraFile
from wan.config.settings import resolve
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.convert import convert
from wan.models.wan.names import NAMING


@pytest.fixture(scope="module")
def checkpoint(random_nano):
    return Checkpoint.open(random_nano)


@pytest.fixture
def base(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="module")
def published(random_nano):
    """The transformer's tensors in published names."""
    return load_file(next(random_nano.glob("*.safetensors")))


def load(checkpoint, *lora, file=None, dtype=torch.float32):
    part = components.transformer_component(checkpoint, file)
    adapters = [read_lora(LoraFile.parse(one), part.model, NAMING) for one in lora]
    return components.load_transformer(part, dtype, "cpu", adapters=adapters)


@torch.no_grad()
def forward(transformer):
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(1, 16, 2, 8, 8, generator=generator, dtype=torch.float32)
    text = torch.randn(1, 512, transformer.config.text_dim, generator=generator)
    latents, text = latents.to(transformer.dtype), text.to(transformer.dtype)
    return transformer(latents, torch.tensor([500]), text, return_dict=False)[0]


def merged(base, *scaled_factors):
    """The state of `base` with each of (scale, factors) merged by hand."""
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for scale, factors in scaled_factors:
        for name, (down, up) in factors.items():
            state[f"{name}.weight"] += scale * (up @ down)
    return state


@pytest.mark.parametrize("naming", weight_files.NAMINGS)
def test_a_lora_in_each_naming_gives_what_merging_it_gives(checkpoint, base, tmp_path, naming):
    factors = weight_files.draw_factors(base)
    file = weight_files.write_lora(tmp_path / "style.safetensors", factors, naming)
    plain, adapted = forward(base), load(checkpoint, f"{file}:0.5")
    scale = weight_files.ALPHA / 3 if naming in weight_files.NAMINGS[-2:] else 1
    base.load_state_dict(merged(base, (0.5 * scale, factors)))
    assert type(adapted.blocks[0].attn1.to_q) is torch.nn.Linear
    torch.testing.assert_close(forward(adapted), forward(base), rtol=1e-5, atol=1e-5)
    assert (forward(base) - plain).abs().max() > 0.1
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(adapted.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


def test_several_loras_of_other_layers_and_ranks_add_up_with_their_scales(checkpoint, base, tmp_path):
    first = weight_files.draw_factors(base, rank=2, seed=1)
    second = {name: pair for name, pair in weight_files.draw_factors(base, 5, 2).items() if "attn1" in name}
    one = weight_files.write_lora(tmp_path / "one.safetensors", first, "diffusers")
    two = weight_files.write_lora(tmp_path / "two.safetensors", second, "musubi")
    adapted = load(checkpoint, f"{one}:0.8", LoraFile(str(two), -1.5))
    base.load_state_dict(merged(base, (0.8, first), (-1.5 * weight_files.ALPHA / 5, second)))
    torch.testing.assert_close(forward(adapted), forward(base), rtol=1e-5, atol=1e-5)


def test_half_precision_is_rounded_once_after_merging(checkpoint, base, tmp_path):
    factors = weight_files.draw_factors(base)
    files = [weight_files.write_lora(tmp_path / f"{n}.safetensors", factors) for n in range(2)]
    adapted, exact = load(checkpoint, *map(str, files), dtype=torch.bfloat16), merged(base, (2.0, factors))
    own = adapted.state_dict()
    assert own["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    for name in factors:
        wanted = exact[f"{name}.weight"].bfloat16()
        assert (own[f"{name}.weight"] == wanted).float().mean() > 0.99


def test_differences_of_whole_tensors_are_added_too(checkpoint, base, tmp_path):
    factors = weight_files.draw_factors(base)
    changes = {
        "blocks.0.self_attn.norm_q.diff": ("blocks.0.attn1.norm_q.weight", 0.3),
        "blocks.1.norm3.diff_b": ("blocks.1.norm2.bias", 0.2),
        "blocks.0.ffn.0.diff_b": ("blocks.0.ffn.net.0.proj.bias", -0.1),
        "blocks.1.diff_m": ("blocks.1.scale_shift_table", 0.05),
        "head.head.diff_b": ("proj_out.bias", 0.1),
        "patch_embedding.diff": ("patch_embedding.weight", 0.02),
    }
    state = base.state_dict()
    differences = {f"diffusion_model.{key}": torch.full_like(state[name], by) for key, (name, by) in changes.items()}
    file = tmp_path / "distilled.safetensors"
    save_file(weight_files.lora_tensors(factors, "comfyui") | differences, file)
    adapted, wanted = load(checkpoint, f"{file}:0.5"), merged(base, (0.5, factors))
    for name, by in changes.values():
        wanted[name] += 0.5 * by
    base.load_state_dict(wanted)
    torch.testing.assert_close(forward(adapted), forward(base), rtol=1e-5, atol=1e-5)


def test_a_lora_that_diffusers_saved_keeps_its_alpha_and_works_as_there(checkpoint, base, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    trained = load(checkpoint)
    trained.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False))
    metadata = trained.peft_config["default"].to_dict()
    WanPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(trained), transformer_lora_adapter_metadata=metadata
    )
    adapted = load(checkpoint, str(tmp_path / "pytorch_lora_weights.safetensors"))
    torch.testing.assert_close(forward(adapted), forward(trained), rtol=1e-4, atol=1e-4)
    assert (forward(adapted) - forward(base)).abs().max() > 0.1


def test_a_lora_works_with_nabla_on_either_layout(random_nano, base, tmp_path):
    file = weight_files.write_lora(tmp_path / "style.safetensors", weight_files.draw_factors(base), "musubi")
    convert(Checkpoint.open(random_nano), tmp_path / "diffusers", "diffusers")
    context, noise = torch.randn(1, 5, base.config.text_dim), torch.randn(16, 3, 16, 16)

    def sample(folder, *lora, **settings):
        pipe = wan.WanT2V.from_pretrained(folder, "nabla-0.5", lora=lora, **settings)
        return pipe.sample(context, noise=noise, steps=2, guide_scale=1)

    published = sample(random_nano, f"{file}:0.7", offload=True)
    torch.testing.assert_close(sample(tmp_path / "diffusers", f"{file}:0.7"), published)
    assert not torch.equal(published, sample(random_nano))


def wrong_lora(kind, base):
    """Tensors of a file that fits `base` not at all, or not in all."""
    tensors = weight_files.lora_tensors(weight_files.draw_factors(base), "comfyui")
    key = "diffusion_model.blocks.1.self_attn.q"
    if kind == "more blocks":
        tensors |= {name.replace("blocks.1.", "blocks.2."): tensor.clone() for name, tensor in tensors.items()}
    elif kind == "wider":
        tensors = {name: torch.cat((tensor, tensor), dim=int("lora_A" in name)) for name, tensor in tensors.items()}
    elif kind == "half":
        del tensors[f"{key}.lora_B.weight"]
    elif kind == "ranks":
        tensors[f"{key}.lora_A.weight"] = torch.zeros(7, 128)
    elif kind == "dora":
        tensors[f"{key}.dora_scale"] = torch.ones(128, 1)
    elif kind == "orphans":
        tensors = weight_files.lora_tensors(weight_files.draw_factors(base), "musubi")
        tensors = {name: tensor for name, tensor in tensors.items() if "_1_" not in name or "up" not in name}
    elif kind == "text encoder":
        tensors |= {f"lora_te_layers_0.lora_{factor}.weight": torch.ones(2, 2) for factor in ("down", "up")}
    elif kind == "nan":
        tensors[f"{key}.lora_B.weight"][3, 1] = torch.nan
    elif kind == "image":
        tensors["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = torch.ones(128)
    elif kind == "difference":
        tensors["diffusion_model.blocks.0.self_attn.norm_q.diff"] = torch.ones(64)
    return {"another model": {"unet.down.lora_A.weight": torch.ones(2, 2)}, "empty": {}}.get(kind, tensors)


@pytest.mark.parametrize(
    "kind, message",
    (
        (
            "more blocks",
            r"40 of 60 weights match .*, not for example 'diffusion_model\.blocks\.2\.cross_attn\.k\.lora_A\.weight'",
        ),
        ("wider", r"is for a blocks\.0\.attn1\.to_k\.weight of \(256, 256\), and here it is \(128, 128\)"),
        ("half", r"38 of 39 weights match the transformer"),
        ("ranks", r"is for a blocks\.1\.attn1\.to_q\.weight of \(128, 3, 7, 128\)"),
        ("dora", r"40 of 41 weights match the transformer, not for example .*dora_scale', which is of DoRA"),
        ("image", r"40 of 41 weights match the transformer, not for example .*norm_k_img\.diff', .*image-to-video"),
        ("difference", r"is for a blocks\.0\.attn1\.norm_q\.weight of \(64,\), and here it is \(128,\)"),
        (
            "orphans",
            r"30 of 50 weights match the transformer, not for example 'lora_unet_blocks_1_\w+\.lora_down\.weight'",
        ),
        ("text encoder", r"40 of 42 weights match the transformer, not for example 'lora_te_layers_0\.lora_down"),
        ("nan", r"'diffusion_model\.blocks\.1\.self_attn\.q\.lora_B\.weight' has values that are not finite"),
        (
            "another model",
            r"0 of 1 weights match the transformer, not for example 'unet\.down\.lora_A\.weight'; use a LoRA",
        ),
        ("empty", r"0 of 0 weights match the transformer"),
    ),
)
def test_a_lora_that_does_not_fit_is_one_line(checkpoint, base, tmp_path, kind, message):
    file = tmp_path / "wrong.safetensors"
    save_file(wrong_lora(kind, base), file)
    with pytest.raises(InputError, match=message) as raised:
        load(checkpoint, str(file))
    assert "\n" not in str(raised.value)


def test_pickles_and_damaged_files_are_refused(checkpoint, tmp_path):
    model = components.transformer_component(checkpoint).model
    for name, message in (("a.pt", "must end in .safetensors"), ("a.safetensors", "truncated or corrupt")):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
        with pytest.raises(InputError, match=message):
            read_lora(LoraFile(str(tmp_path / name)), model, NAMING)
        with pytest.raises(InputError, match=message):
            components.transformer_component(checkpoint, tmp_path / name)
    with pytest.raises(InputError, match="lora .*none.safetensors is not a file"):
        read_lora(LoraFile("none.safetensors"), model, NAMING)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_single_file_in_either_naming(checkpoint, base, published, tmp_path, dtype):
    for number, state in enumerate((published, base.state_dict())):
        file = tmp_path / f"{number}.safetensors"
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, file)
        loaded = load(checkpoint, file=file).state_dict()
        assert all(torch.equal(loaded[name], base.state_dict()[name].to(dtype).float()) for name in loaded)


def test_a_checkpoint_beside_a_single_file_needs_no_transformer_of_its_own(damaged, published, tmp_path):
    file = next(damaged.glob("*.safetensors"))
    pipe = wan.WanT2V.from_pretrained(damaged, transformer=file.rename(tmp_path / "single.safetensors"))
    assert torch.equal(pipe.transformer.patch_embedding.weight, published["patch_embedding.weight"])


@pytest.mark.parametrize("per_row", (False, True))
def test_scaled_float8_is_unpacked(checkpoint, base, published, tmp_path, per_row):
    exact = weight_files.write_float8(tmp_path / "float8.safetensors", published, per_row)
    save_file(exact, tmp_path / "exact.safetensors")
    packed, exact = (forward(load(checkpoint, file=tmp_path / f"{name}.safetensors")) for name in ("float8", "exact"))
    assert torch.equal(packed, exact)
    assert 0 < (packed - forward(base)).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("kind", ("Q8_0", "Q4_0", "BF16"))
def test_gguf_is_run_packed(checkpoint, published, tmp_path, kind):
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-gguf.txt")
    save_file(weight_files.write_gguf(tmp_path / "a.gguf", published, kind), tmp_path / "exact.safetensors")
    packed = load(checkpoint, file=tmp_path / "a.gguf")
    exact = load(checkpoint, file=tmp_path / "exact.safetensors")
    assert packed.blocks[0].attn1.to_q.weight.dtype == torch.uint8 and packed.dtype == torch.float32
    torch.testing.assert_close(forward(packed), forward(exact), rtol=1e-3, atol=1e-3)
    assert packed.blocks[0].scale_shift_table.dtype == torch.float32


def test_gguf_of_any_naming_and_of_all_layers_in_half_precision(checkpoint, base, published, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-gguf.txt")
    exact = weight_files.write_gguf(tmp_path / "a.gguf", published, all_packed=True)
    save_file(exact, tmp_path / "exact.safetensors")
    weight_files.write_gguf(tmp_path / "b.gguf", published, prefix="diffusion_model.", all_packed=True)
    weight_files.write_gguf(tmp_path / "c.gguf", base.state_dict(), all_packed=True)
    wanted = load(checkpoint, file=tmp_path / "exact.safetensors", dtype=torch.bfloat16)
    packed = load(checkpoint, file=tmp_path / "a.gguf", dtype=torch.bfloat16)
    error = (forward(packed) - forward(wanted)).norm() / forward(wanted).norm()
    assert packed.dtype == torch.bfloat16 and error < 2e-2
    for name, tensor in packed.state_dict().items():
        assert tensor.dtype in (torch.uint8, wanted.state_dict()[name].dtype), name
    for name in ("b", "c"):
        assert forward(load(checkpoint, file=tmp_path / f"{name}.gguf")).isfinite().all()


def test_a_lora_that_changes_the_whole_of_a_packed_weight(checkpoint, published, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-gguf.txt")
    weight_files.write_gguf(tmp_path / "a.gguf", published)
    save_file({"diffusion_model.blocks.0.ffn.0.diff": torch.ones(256, 128)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="changes the whole of blocks.0.ffn.net.0.proj.weight, which is packed"):
        load(checkpoint, str(tmp_path / "a.safetensors"), file=tmp_path / "a.gguf")


def test_loras_beside_gguf_give_what_merging_gives(checkpoint, base, published, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-gguf.txt")
    save_file(weight_files.write_gguf(tmp_path / "a.gguf", published), tmp_path / "exact.safetensors")
    files = []
    for seed in range(2):
        tensors = weight_files.lora_tensors(weight_files.draw_factors(base, 2, seed), "comfyui")
        tensors["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.full((128,), 0.1)
        save_file(tensors, tmp_path / f"{seed}.safetensors")
        files.append(f"{tmp_path / f'{seed}.safetensors'}:{0.5 + seed}")
    beside = load(checkpoint, *files, file=tmp_path / "a.gguf")
    merged_in = load(checkpoint, *files, file=tmp_path / "exact.safetensors")
    torch.testing.assert_close(forward(beside), forward(merged_in), rtol=1e-3, atol=1e-3)


def test_a_pipeline_samples_from_gguf_with_nabla_and_a_lora_in_one_graph(random_nano, base, published, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-gguf.txt")
    save_file(weight_files.write_gguf(tmp_path / "a.gguf", published), tmp_path / "exact.safetensors")
    lora = [str(weight_files.write_lora(tmp_path / "style.safetensors", weight_files.draw_factors(base)))]
    context, noise = torch.randn(1, 5, base.config.text_dim), torch.randn(16, 3, 16, 16)
    results, graphs = [], []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph

    for name in ("a.gguf", "exact.safetensors"):
        pipe = wan.WanT2V.from_pretrained(random_nano, "nabla-0.7", transformer=tmp_path / name, lora=lora)
        for block in pipe.transformer.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=collect)
        results.append(pipe.sample(context, noise=noise, steps=2, guide_scale=1))
        assert len(graphs) == len(results)
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", ({"fp8": True}, {"dit_fsdp": True}))
def test_what_does_not_go_with_packed_weights(random_nano, published, tmp_path, monkeypatch, options):
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-gguf.txt")
    weight_files.write_gguf(tmp_path / "a.gguf", published)
    monkeypatch.setattr("wan.models.wan.loading.check_quantization", lambda *_: None)
    monkeypatch.setattr("wan.models.wan.loading._check_options", lambda *_: None)
    with pytest.raises(InputError, match="GGUF are packed, which goes neither with fp8 nor with dit_fsdp"):
        wan.WanT2V.from_pretrained(random_nano, transformer=tmp_path / "a.gguf", **options)


def test_without_gguf_the_error_says_what_to_install(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("wan.checkpoints.gguf_file.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs gguf; pip install -r requirements-gguf.txt"):
        components.transformer_component(checkpoint, tmp_path / "a.gguf")


def test_a_damaged_gguf(checkpoint, published, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements-gguf.txt")
    file = tmp_path / "a.gguf"
    weight_files.write_gguf(file, published)
    for content in (b"not at all", file.read_bytes()[:-4000]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="a.gguf is truncated or corrupt"):
            components.transformer_component(checkpoint, file)


def test_a_single_file_of_another_model(checkpoint, published, tmp_path):
    def refused(state, message):
        save_file(state, tmp_path / "wrong.safetensors")
        with pytest.raises(InputError, match=message):
            components.transformer_component(checkpoint, tmp_path / "wrong.safetensors")

    fewer = {name: tensor for name, tensor in published.items() if not name.startswith("blocks.1.")}
    refused(fewer, "wrong.safetensors has 1 blocks of width 128, but checkpoint .* is of 2 blocks of width 128")
    refused({"a.lora_A.weight": torch.ones(1)}, "is not a transformer of Wan: it has no patch_embedding.weight")
    refused(published | {"img_emb.proj.1.bias": torch.ones(3)}, "'img_emb.proj.1.bias' does not belong to this model")
    text = "text_embedding.0.bias"
    refused({name: tensor for name, tensor in published.items() if name != text}, f"'{text}' is missing")
    refused(published | {"blocks.9.ffn.0.scale_weight": torch.ones(1)}, "has a scale for 'blocks.9.ffn.0.weight'")
    refused(published | {f"diffusion_model.{text}": torch.ones(64)}, f"{text}' under another name again")
    odd = {"blocks.0.ffn.0.scale_weight": torch.ones(7)}
    save_file(published | odd, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"a scale is \(7,\); only one, or one a row, is read"):
        load(checkpoint, file=tmp_path / "odd.safetensors")


def test_settings_make_the_round_trip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"lora": ["a.safetensors:0.8", "b.safetensors", {"file": "c:d.safetensors", "scale": 2}]}
    settings = resolve({"checkpoint": "x", "prompt": "y", "transformer": "t.gguf", **given})
    assert [(file.file, file.scale) for file in settings.lora] == [
        (f"{tmp_path}/a.safetensors", 0.8),
        (f"{tmp_path}/b.safetensors", 1.0),
        (f"{tmp_path}/c:d.safetensors", 2),
    ]
    monkeypatch.chdir(tmp_path.parent)
    assert resolve(json.loads(json.dumps(settings.to_dict()))) == settings
    assert settings.transformer == f"{tmp_path}/t.gguf"


@pytest.mark.parametrize(
    "given, message",
    (
        ({"lora": "a.safetensors"}, "lora 'a.safetensors' is not a list"),
        ({"lora": [3]}, "lora 3 is neither a file"),
        ({"lora": ["a:nan"]}, "lora scale nan is not a number"),
        ({"lora": ["a.safetensors:0,8"]}, "scale '0,8' is not a number; write a.safetensors:0.8"),
        ({"lora": ["a.safetensors:abc"]}, "lora 'a.safetensors:abc': scale 'abc' is not a number"),
        ({"lora": [":0.5"]}, "lora file '' is not the path of a file"),
        ({"lora": [{"file": "a", "weight": 1}]}, "lora has an unknown key 'weight'"),
        ({"lora": [{"scale": 1}]}, "lora file None is not the path of a file"),
        ({"transformer": 3}, "transformer 3 is not the path of a file"),
    ),
)
def test_settings_that_are_wrong(given, message):
    with pytest.raises(InputError, match=message):
        resolve({"checkpoint": "x", "prompt": "y", **given})
