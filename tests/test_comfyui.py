"""The ComfyUI node, on a stub of what it touches there: the model patcher, wrappers, attention and its override."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from places import ROOT
from torch import Tensor, nn

import nabla
from nabla import InputError, NablaConfig

NODE = ROOT / "integrations" / "comfyui" / "nabla_node.py"
HEADS, WIDTH = 2, 32
CONFIG = NablaConfig(threshold=0.5, window=(1, 1, 1))
INPUTS = dict(threshold=0.5, keep=0.0, window_frames=1, window_rows=1, window_columns=1, dense_steps=0)
SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])


@pytest.fixture(scope="module")
def node():
    comfy, extension = ModuleType("comfy"), ModuleType("comfy.patcher_extension")
    comfy.patcher_extension = extension
    extension.WrappersMP = SimpleNamespace(DIFFUSION_MODEL="diffusion_model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "comfy", comfy)
        patch.setitem(sys.modules, "comfy.patcher_extension", extension)
        spec = importlib.util.spec_from_file_location("nabla_node", NODE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask=None, **_) -> Tensor:
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def optimized_attention(*args, transformer_options: dict, **kwargs) -> Tensor:
    """As ComfyUI decorates its kernels: an override is called first, and is given the kernel."""
    override = transformer_options.get("optimized_attention_override")
    kwargs |= {"transformer_options": transformer_options, "_inside_attn_wrapper": True}
    return plain_attention(*args, **kwargs) if override is None else override(plain_attention, *args, **kwargs)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict) -> Tensor:
        qkv = self.q(x), self.k(context), self.v(context)
        return self.o(optimized_attention(*qkv, heads=HEADS, transformer_options=transformer_options))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Attention(), Attention()

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict) -> Tensor:
        x = x + self.self_attn(x, x, transformer_options)
        return x + self.cross_attn(x, context, transformer_options)


class StubWan(nn.Module):
    """The order in which ComfyUI's Wan model calls wrappers, embeds patches and attends."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size = (1, 2, 2)
        self.patch_embedding = nn.Conv3d(4, WIDTH, self.patch_size, self.patch_size)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, **extra):
        by_key = transformer_options["wrappers"].get("diffusion_model", {})
        call = Executor([wrapper for wrappers in by_key.values() for wrapper in wrappers], self._forward, self)
        return call(x, timestep, context, clip_fea, time_dim_concat, transformer_options, **extra)

    def _forward(self, x, timestep, context, clip_fea, time_dim_concat, transformer_options, reference=None):
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2, 0, 0), mode="circular")
        x = x if time_dim_concat is None else torch.cat((x, time_dim_concat), dim=2)
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        x = x if reference is None else torch.cat((reference, x), dim=1)
        for block in self.blocks:
            x = block(x, context, transformer_options)
        return x


class Executor:
    """What a wrapper is given: a call of the next one, or of the model's own forward after the last."""

    def __init__(self, wrappers: list, original, class_obj: nn.Module) -> None:
        self.wrappers, self.original, self.class_obj = wrappers, original, class_obj

    def __call__(self, *args, **kwargs) -> Tensor:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        first, *others = self.wrappers
        return first(Executor(others, self.original, self.class_obj), *args, **kwargs)


class Patcher:
    def __init__(self, network: nn.Module, options: dict | None = None, wrappers: dict | None = None) -> None:
        self.network, self.model_options = network, {"transformer_options": dict(options or {})}
        self.wrappers = {kind: {key: list(w) for key, w in keyed.items()} for kind, keyed in (wrappers or {}).items()}

    def clone(self) -> Patcher:
        return Patcher(self.network, self.model_options["transformer_options"], self.wrappers)

    def get_model_object(self, name: str) -> nn.Module:
        assert name == "diffusion_model"
        return self.network

    def add_wrapper_with_key(self, kind: str, key: str, wrapper) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    @torch.inference_mode()
    def __call__(self, x: Tensor, context: Tensor, sigma: float = 1.0, **extra) -> Tensor:
        options = self.model_options["transformer_options"] | {"wrappers": self.wrappers, "sample_sigmas": SIGMAS}
        sigmas = torch.full((len(x),), sigma)
        return self.network(x, sigmas, context, transformer_options=options | {"sigmas": sigmas}, **extra)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Patcher(StubWan().eval())


def inputs(frames: int = 2, height: int = 32, width: int = 38, batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, frames, height, width, generator=generator), torch.randn(batch, 9, WIDTH)


def by_hand(model: Patcher, x: Tensor, context: Tensor, grid: tuple[int, int, int], **extra) -> Tensor:
    """The same network with `nabla.attention` called where q and k are of one length."""

    def attend(func, q, k, v, heads, **kwargs):
        if q.shape != k.shape:
            return func(q, k, v, heads)
        return nabla.attention(*(y.unflatten(2, (heads, -1)) for y in (q, k, v)), grid, CONFIG).flatten(2)

    return Patcher(model.network, {"optimized_attention_override": attend})(x, context, **extra)


@pytest.mark.parametrize(
    "size, grid", (((2, 32, 38), (2, 16, 19)), ((3, 21, 33), (3, 11, 17)), ((1, 32, 48), (1, 16, 24)))
)
def test_equals_the_op_in_every_self_attention_and_leaves_the_model_alone(node, model, size, grid):
    x, context = inputs(*size, batch=2)
    dense = model(x, context)
    (patched,) = node.NablaAttention().apply(model, **INPUTS)
    torch.testing.assert_close(patched(x, context), by_hand(model, x, context, grid))
    assert (patched(x, context) - dense).abs().max() > 1e-4
    assert torch.equal(model(x, context), dense)


def test_frames_put_behind_the_video_belong_to_the_grid(node, model):
    x, context = inputs()
    extra = {"time_dim_concat": torch.randn(1, 4, 1, 32, 38)}
    (patched,) = node.NablaAttention().apply(model, **INPUTS)
    torch.testing.assert_close(patched(x, context, **extra), by_hand(model, x, context, (3, 16, 19), **extra))


def test_threshold_1_equals_dense(node, model):
    x, context = inputs()
    (patched,) = node.NablaAttention().apply(model, **INPUTS | {"threshold": 1.0})
    torch.testing.assert_close(patched(x, context), model(x, context))


@pytest.mark.parametrize("dense_steps", (2, 2.0, 0.4))
def test_the_first_steps_run_dense(node, model, dense_steps):
    x, context = inputs()
    (patched,) = node.NablaAttention().apply(model, **INPUTS | {"dense_steps": dense_steps})
    dense = model(x, context)
    # Between two sigmas: a second evaluation within the step that the first of them began.
    at = {sigma: torch.equal(patched(x, context, sigma), dense) for sigma in (1.0, 0.9, 0.8, 0.6, 0.5, 0.3, 0.2)}
    assert at == {1.0: True, 0.9: True, 0.8: True, 0.6: True, 0.5: False, 0.3: False, 0.2: False}


def test_all_else_goes_to_the_override_that_was_there(node, model):
    x, context = inputs()
    seen = []

    def other(func, q, k, *args, **kwargs):
        seen.append((q.shape[1], k.shape[1], func is plain_attention))
        return func(q, k, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = other
    (patched,) = node.NablaAttention().apply(model, **INPUTS | {"dense_steps": 1})
    patched(x, context, 0.5)
    assert seen == [(608, 9, True)] * 2
    patched(x, context, 1.0)
    assert seen[2:] == [(608, 608, True), (608, 9, True)] * 2


@pytest.mark.parametrize(
    "inputs_of_node, message",
    (
        ({"keep": 0.5}, "threshold 0.5 and keep 0.5 are alternatives"),
        ({"dense_steps": 1.5}, "dense_steps 1.5: give a whole number of sampling steps, 0 or more, or a share"),
        ({"window_rows": 0}, "window .1, 0, 1. is not three positive integers"),
    ),
)
def test_bad_inputs(node, model, inputs_of_node, message):
    with pytest.raises(InputError, match=message):
        node.NablaAttention().apply(model, **INPUTS | inputs_of_node)


def test_what_it_cannot_do_is_one_line(node, model):
    with pytest.raises(InputError, match="Linear is not one of ComfyUI's Wan models"):
        node.NablaAttention().apply(Patcher(nn.Linear(1, 1)), **INPUTS)
    (patched,) = node.NablaAttention().apply(model, **INPUTS)
    x, context = inputs()
    with pytest.raises(InputError, match=r"618 tokens are not the 608 of the video's grid \(2, 16, 19\)"):
        patched(x, context, reference=torch.randn(1, 10, WIDTH))
    with pytest.raises(InputError, match="a video of 608 tokens cannot be told from its text"):
        patched(x, torch.randn(1, 608, WIDTH))
    with pytest.raises(InputError, match="does not say which step runs"):
        node.step_of({})


def test_what_comfyui_reads(node):
    kind = node.NODE_CLASS_MAPPINGS["NablaAttention"]
    assert list(kind.INPUT_TYPES()["required"]) == ["model", *INPUTS]
    assert set(node.NODE_DISPLAY_NAME_MAPPINGS) == set(node.NODE_CLASS_MAPPINGS)
    assert callable(getattr(kind, kind.FUNCTION)) and kind.RETURN_TYPES == ("MODEL",)
    defaults = {name: options["default"] for name, (_, options) in list(kind.INPUT_TYPES()["required"].items())[1:]}
    assert defaults == dict.fromkeys(INPUTS, 0) | {"threshold": 0.7}
