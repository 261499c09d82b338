"""Step caches on Kandinsky-5's transformer, whose blocks and last layer have names of their own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kandinsky_set import expected, pipeline
from torch._dynamo.testing import CompileCounter

from nabla import InputError, NablaConfig
from wan.attention.apply import apply_attention
from wan.caches.apply import KINDS, apply_cache, remove_cache
from wan.caches.calibration import calibrated
from wan.config.cache_settings import RATIOS_FOLDER, CacheSettings
from wan.models.kandinsky.processor import TRANSFORMER, install_processors, velocity_of
from wan.models.kandinsky.random_checkpoint import random_transformer

STEPS = 6
BRANCHES = ("cond", "uncond")
RATIOS = (1.0, 1.1, 0.95, 1.05, 0.98, 1.02)


@pytest.fixture(scope="module")
def transformer():
    made = random_transformer("kandinsky5-nano", torch.float32, torch.device("cpu"))
    install_processors(made)
    return made


@pytest.fixture(autouse=True)
def as_made(transformer):
    yield
    remove_cache(transformer)


def exact(kind: str) -> CacheSettings:
    if kind == "taylorseer":
        return CacheSettings(kind, warmup=1)
    return CacheSettings(kind, 0, warmup=0, ratios=RATIOS if kind == "mag" else None)


def loose(kind: str) -> CacheSettings:
    """In steps 1, 2, 4 and 5 of 6 it reuses; `taylorseer` in 1, 3 and 4."""
    if kind == "taylorseer":
        return CacheSettings(kind, interval=3, warmup=0)
    return CacheSettings(kind, 1e6, max_skips=2, ratios=RATIOS if kind == "mag" else None)


@torch.no_grad()
def sample(transformer, cache=None, steps: int = STEPS, reused: list[int] | None = None) -> torch.Tensor:
    """A guided walk; the branches' texts differ in length. reused: gets how many forwards were by the end of a step."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    latents = draw(1, 16, 2, 16, 16)
    texts = {name: (draw(1, rows, 64), draw(1, 32)) for name, rows in zip(BRANCHES, (7, 4))}
    if cache is not None:
        cache.begin(steps, dense_steps=0)
    for step in range(steps):
        timestep = torch.tensor([1000.0 * (1 - step / steps)])
        velocity = {}
        for name, (text, pooled) in texts.items():
            arguments = (transformer, latents, timestep, text, pooled, (1.0, 2.0, 2.0))
            if cache is None:
                velocity[name] = velocity_of(*arguments)
            else:
                with cache.branch(name, step):
                    velocity[name] = velocity_of(*arguments)
        latents = latents - (velocity["uncond"] + 5 * (velocity["cond"] - velocity["uncond"])) / steps
        if reused is not None:
            reused.append(cache.reused)
    if cache is not None:
        cache.end()
    return latents


class Twin(torch.nn.Module):
    """All blocks as one, which in the steps that are given adds what those after the first few added last."""

    def __init__(self, blocks: torch.nn.ModuleList, first: int, reuses: set[int]):
        super().__init__()
        self.blocks, self.first, self.reuses, self.calls, self.kept = blocks, first, reuses, 0, {}

    def forward(self, hidden: torch.Tensor, *others) -> torch.Tensor:
        step, branch = divmod(self.calls, 2)
        self.calls += 1
        for block in self.blocks[: self.first]:
            hidden = block(hidden, *others)
        if step in self.reuses:
            return hidden + self.kept[branch]
        before = hidden
        for block in self.blocks[self.first :]:
            hidden = block(hidden, *others)
        self.kept[branch] = hidden - before
        return hidden


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_reuses_nothing_changes_nothing(transformer, kind):
    plain = sample(transformer)
    cache = apply_cache(transformer, exact(kind), TRANSFORMER)
    assert torch.equal(sample(transformer, cache), plain) and (cache.forwards, cache.reused) == (2 * STEPS, 0)
    remove_cache(transformer)
    assert torch.equal(sample(transformer), plain)


@pytest.mark.parametrize("kind", ("first_block", "mag"))
def test_what_is_reused_is_what_the_branch_computed_last(transformer, kind, monkeypatch):
    twin = Twin(transformer.visual_transformer_blocks, KINDS[kind].leading, {1, 2, 4, 5})
    with monkeypatch.context() as patch:
        patch.setitem(transformer._modules, "visual_transformer_blocks", torch.nn.ModuleList([twin]))
        wanted = sample(transformer)
    cache = apply_cache(transformer, loose(kind), TRANSFORMER)
    assert torch.equal(sample(transformer, cache), wanted) and cache.reused == 8
    assert not torch.equal(wanted, sample_without(transformer))


def test_taylorseer_carries_on_what_the_last_layer_gave(transformer, monkeypatch):
    plain, calls, known = transformer.forward, iter(range(2 * STEPS)), {0: [], 1: []}

    def forward(*args, **others):
        step, branch = divmod(next(calls), 2)
        points = known[branch]
        if step in (0, 2, 5):
            points.append((step, plain(*args, **others)))
            return points[-1][1]
        (last, value), (before, earlier) = points[-1], points[-2] if len(points) > 1 else (-1, points[-1][1])
        return value + (value - earlier) / (last - before) * (step - last)

    with monkeypatch.context() as patch:
        patch.setattr(transformer, "forward", forward)
        wanted = sample(transformer)
    cache = apply_cache(transformer, loose("taylorseer"), TRANSFORMER)
    ran = []
    hook = transformer.visual_transformer_blocks[0].self_attention.register_forward_pre_hook(lambda *_: ran.append(1))
    torch.testing.assert_close(sample(transformer, cache), wanted, rtol=0, atol=1e-4)
    hook.remove()
    assert (cache.forwards, cache.reused, len(ran)) == (2 * STEPS, 6, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", (False, True))
def test_a_pipeline_walks_with_a_cache(kind, sparse):
    pipe = pipeline()
    if sparse:
        apply_attention([pipe.transformer], NablaConfig(threshold=0.6, window=(1, 1, 3), mask_refresh=2), TRANSFORMER)
    given = expected()
    text, pooled = given["dit.text"], given["dit.pooled"]
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(given["dit.latents"].shape[:-1] + (pipe.transformer.config.out_visual_dim,), generator=draw)
    walk = partial(pipe.sample, text, pooled, text[:3], -pooled, noise=noise, steps=STEPS, guide_scale=3.0)
    plain = walk()
    cache = apply_cache(pipe.transformer, exact(kind), TRANSFORMER)
    assert torch.equal(walk(), plain) and (cache.forwards, cache.reused) == (2 * STEPS, 0)
    cache = apply_cache(pipe.transformer, loose(kind), TRANSFORMER)
    reused = walk()
    assert cache.reused == (6 if kind == "taylorseer" else 8) and torch.equal(walk(), reused)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_stay_one_graph(kind):
    transformer = random_transformer("kandinsky5-nano", torch.float32, torch.device("cpu"))
    install_processors(transformer)
    counter = CompileCounter()
    for block in transformer.visual_transformer_blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    cache = apply_cache(transformer, loose(kind), TRANSFORMER)
    sample(transformer, cache)
    once = counter.frame_count
    sample(transformer, cache)
    # Texts of two lengths; more blocks and forwards make no more graphs.
    assert once == counter.frame_count <= 2 and cache.reused > 0


def test_ratios_can_be_measured(transformer):
    with calibrated([transformer], TRANSFORMER) as calibration:
        sample(transformer, calibration.every[0])
    ratios = calibration.ratios()
    assert len(ratios) == STEPS and ratios[0] == 1 and all(0.1 < ratio < 10 for ratio in ratios)


def native_rule(ratios: tuple[float, ...]) -> list[bool]:
    """Which of as many steps the native program leaves out, at its threshold of 0.12 and its two in a row at most."""
    left_out, ratio, error, row = [], 1.0, 0.0, 0
    for step, own in enumerate(ratios):
        skipped = False
        if step >= int(0.2 * len(ratios)):
            ratio, row = ratio * own, row + 1
            error += abs(1 - ratio)
            skipped = error < 0.12 and row <= 2
            if not skipped:
                ratio, error, row = 1.0, 0.0, 0
        left_out.append(skipped)
    return left_out


def test_published_ratios_leave_out_what_the_native_program_does(transformer):
    files = sorted(RATIOS_FOLDER.glob("*.json"))
    assert len(files) == 8
    for file in files:
        settings = CacheSettings.parse(f"mag:0.12:{file.name}")
        assert len(settings.ratios) == settings.measured_on["steps"] == 50 and settings.max_skips == 2
        assert sum(native_rule(settings.ratios)) == (25 if file.stem == "kandinsky5_pro_i2v_5s_hd" else 26)
    reused: list[int] = []
    sample(transformer, apply_cache(transformer, settings, TRANSFORMER), 50, reused)
    assert [after - before for before, after in zip([0, *reused], reused)] == [
        2 * n for n in native_rule(settings.ratios)
    ]


def test_what_is_said_beats_what_the_file_of_ratios_says(tmp_path, monkeypatch):
    given = {"kind": "mag", "threshold": 0.12, "max_skips": 5, "ratios": "kandinsky5_lite_sft_10s.json"}
    assert CacheSettings.parse(given).max_skips == 5
    assert CacheSettings("first_block").max_skips == 3 == CacheSettings("mag", ratios=(1.0,)).max_skips
    # A file of that name here is meant before one that comes with the program.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kandinsky5_lite_sft_10s.json").write_text('{"ratios": [1.5], "max_skips": "many"}')
    with pytest.raises(InputError, match="max_skips 'many' is not a whole number"):
        CacheSettings.parse("mag:0.12:kandinsky5_lite_sft_10s.json")
    assert CacheSettings.parse(given).ratios == (1.5,)


def sample_without(transformer) -> torch.Tensor:
    remove_cache(transformer)
    return sample(transformer)
