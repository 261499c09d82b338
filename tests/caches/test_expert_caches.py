"""Step caches of two experts: warm-up, intervals and ratios are those of the video, and each goes on from its own."""

from __future__ import annotations

import pytest
import torch
from test_step_cache import LOOSE, sample, sample_by_twin, settings

import wan
from nabla import NablaConfig
from wan.caches.applied import reuse_of
from wan.caches.apply import apply_cache
from wan.caches.calibration import calibrated
from wan.config.cache_settings import CacheSettings
from wan.config.settings import SamplingSettings, VideoSettings
from wan.models.wan.processor import TRANSFORMER
from wan.models.wan.random_checkpoint import random_transformer
from wan.sampling.solvers import make_solver

CPU = torch.device("cpu")
SPARSE = NablaConfig(threshold=0.4)
STEPS, HIGH = 6, 4
WALK = {"shift": 12.0, "guide_scale": (3.0, 4.0)}


@pytest.fixture
def pipe():
    high, low = (random_transformer("nano", torch.float32, CPU, seed, layers=3) for seed in (1, 2))
    models = high, None, None, None
    made = wan.WanT2V(
        *(*models, CPU, CPU, 512, False, SamplingSettings(), VideoSettings()), transformer_2=low, boundary=0.875
    )
    wan.apply_attention(made.transformers, SPARSE)
    return made


def put_on(pipe, cache: CacheSettings) -> None:
    for one in pipe.transformers:
        apply_cache(one, cache, TRANSFORMER)


@pytest.mark.parametrize(
    "changes, dense_steps, reuses",
    (
        (dict(max_skips=2, warmup=0), 0, {1, 2, 5}),
        (dict(max_skips=9, warmup=0), 0, {1, 2, 3, 5}),
        (dict(max_skips=9, warmup=0.5), 0, {3, 5}),
        (dict(max_skips=9, warmup=0), 5, {5}),
        (dict(max_skips=9, warmup=1), 0, set()),
    ),
)
@pytest.mark.parametrize("kind", LOOSE)
def test_what_is_reused_is_what_the_same_expert_computed_last(pipe, kind, changes, dense_steps, reuses):
    wan.apply_attention(pipe.transformers, NablaConfig(threshold=0.4, dense_steps=dense_steps))
    exact = sample_by_twin(pipe, kind, reuses, begins=(0, HIGH), **WALK)
    put_on(pipe, settings(kind, LOOSE[kind], **changes))
    # Again, since nothing outlives a video.
    for _ in range(2):
        assert torch.equal(sample(pipe, **WALK), exact)
        assert reuse_of(pipe.transformers) == (2 * STEPS, 2 * len(reuses))


@pytest.mark.parametrize("step, reuses", ((1, {2, 3, 5}), (3, {1, 2, 5}), (4, {1, 2, 3, 5}), (5, {1, 2, 3})))
def test_ratios_are_those_of_the_video_s_steps(pipe, step, reuses):
    ratios = [1.0] * STEPS
    ratios[step] = 5.0
    exact = sample_by_twin(pipe, "mag", reuses, begins=(0, HIGH), **WALK)
    put_on(pipe, CacheSettings("mag", 0.5, ratios=tuple(ratios), max_skips=9, warmup=0))
    assert torch.equal(sample(pipe, **WALK), exact)


@torch.no_grad()
def sample_along_lines(pipe, computed: set[int]) -> torch.Tensor:
    """TaylorSeer the obvious way: velocities of steps not computed go on along a line, by expert and branch."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 16, 16, generator=generator)
    texts = torch.randn(2, 7, pipe.transformer.config.text_dim, generator=generator).split(1)
    solver, kept = make_solver("unipc", STEPS, 12.0), {}
    for step, timestep in enumerate(solver.timesteps):
        expert = int(step >= HIGH)
        model, scale = pipe.transformers[expert], (4.0, 3.0)[expert]
        velocities = []
        for branch, text in enumerate(texts):
            points = kept.setdefault((expert, branch), [])
            if step in computed:
                points.append((step, model(latents, timestep[None], text, return_dict=False)[0]))
            (last, velocity), *_ = reversed(points)
            if len(points) > 1:
                before, earlier = points[-2]
                velocity = velocity + (velocity - earlier) / (last - before) * (step - last)
            velocities.append(velocity)
        on, off = velocities
        latents = solver.step(off + scale * (on - off), timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize(
    "interval, warmup, computed",
    # Of interval 2 after a first step, and of interval 3 after three; always step 4, the second expert's first.
    ((2, 0, {0, 2, 4}), (3, 0.5, {0, 1, 2, 4}), (9, 0.5, {0, 1, 2, 4}), (5, 0, {0, 2, 4})),
)
def test_taylorseer_goes_on_along_each_expert_s_own_line(pipe, interval, warmup, computed):
    exact = sample_along_lines(pipe, computed)
    put_on(pipe, CacheSettings("taylorseer", interval=interval, warmup=warmup))
    for _ in range(2):
        torch.testing.assert_close(sample(pipe, **WALK), exact, atol=2e-4, rtol=0)
        assert reuse_of(pipe.transformers) == (2 * STEPS, 2 * (STEPS - len(computed)))


def test_what_an_expert_keeps_is_freed_as_it_goes(pipe):
    put_on(pipe, settings("first_block", LOOSE["first_block"]))

    def kept(model) -> int:
        return len(model.step_cache.leader(model.blocks[0]).state_manager._state_cache)

    seen = []
    for one in pipe.transformers:
        one.register_forward_hook(lambda *_: seen.append(tuple(map(kept, pipe.transformers))))
    sample(pipe, **WALK)
    assert seen == [(1, 0)] + [(2, 0)] * (2 * HIGH - 1) + [(0, 1)] + [(0, 2)] * (2 * (STEPS - HIGH) - 1)
    assert tuple(map(kept, pipe.transformers)) == (0, 0)


@pytest.mark.parametrize("scales", ((3.0, 4.0), (3.0, 1.0), (1.0, 4.0), 1.0))
def test_ratios_are_measured_over_both(pipe, scales):
    alone = []
    for one in pipe.transformers:
        with calibrated([one], TRANSFORMER) as calibration:
            sample(pipe, **WALK | {"guide_scale": scales})
            alone.append(calibration.ratios())
    with calibrated(pipe.transformers, TRANSFORMER) as calibration:
        for _ in range(2):
            sample(pipe, **WALK | {"guide_scale": scales})
        ratios = calibration.ratios()
    assert tuple(map(len, alone)) == (HIGH, STEPS - HIGH) and ratios == pytest.approx(alone[0] + alone[1])
    assert ratios[0] == ratios[HIGH] == 1 and pipe.cache is None
    put_on(pipe, CacheSettings("mag", 1e6, ratios=tuple(ratios), max_skips=9))
    assert sample(pipe, **WALK).isfinite().all()


def test_a_video_of_the_first_expert_alone_has_its_ratios(pipe):
    with calibrated(pipe.transformers, TRANSFORMER) as calibration:
        sample(pipe, shift=100.0, guide_scale=3.0, steps=3)
        assert len(calibration.ratios()) == 3
