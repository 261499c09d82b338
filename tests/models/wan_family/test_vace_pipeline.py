"""Videos under VACE's context: what is given and left out, and all that changes how a transformer runs."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import vace_pipelines
from conftest import relative_error
from diffusers import WanTransformer3DModel
from vace_pipelines import FRAMES, SIZE, drawn, given, pipeline, sample

import wan
from nabla import InputError, NablaConfig
from wan.attention.apply import applied_attention
from wan.caches.apply import apply_cache
from wan.caches.ran import blocks_left_out
from wan.config.cache_settings import CacheSettings
from wan.config.settings import VideoSettings
from wan.files.source_video import SourceVideo
from wan.memory.placement import on_device
from wan.memory.streaming import stream_blocks
from wan.models.wan.fused_gelu import FusedGELU, fuse_gelu
from wan.models.wan.inputs import fitted
from wan.models.wan.processor import VACE_TRANSFORMER, blocks_of
from wan.quantize.quantizer import Quantizer
from wan.sampling.request import VideoRequest

CPU = torch.device("cpu")


def condition_of(pipe, **changes):
    return pipe.condition(**{**given(), "size": SIZE, "frame_num": FRAMES, **changes})


def test_references_stand_in_front_of_noise_and_context_and_not_of_the_video():
    pipe = pipeline()
    condition = condition_of(pipe)
    assert condition.shape == (96, *vace_pipelines.LATENTS) and condition.references == 1
    latents = sample(pipe, condition, batch=2)
    assert latents.shape == (2, 16, 2, 12, 10)
    # In a batch as alone, and without a batch.
    assert relative_error(latents[1:], sample(pipe, condition)) < 1e-5
    alone = pipe.sample(torch.zeros(7, 32), noise=torch.zeros(16, *vace_pipelines.LATENTS), guide_scale=1, steps=1,
                        conditions=condition)  # fmt: skip
    assert alone.shape == (16, 2, 12, 10)
    assert pipe.glimpse(torch.zeros(1, 16, *vace_pipelines.LATENTS)).shape == (1, 3, 96, 80)


def test_nothing_given_is_a_video_made_anew():
    pipe = pipeline()
    condition = pipe.condition(size=SIZE, frame_num=FRAMES)
    zeros = pipe.encode_video(torch.zeros(3, FRAMES, *SIZE[::-1]))
    assert torch.equal(condition.y, torch.cat((zeros, zeros, torch.ones(64, *zeros.shape[1:]))))


def test_a_source_without_a_mask_is_all_made_anew_and_a_picture_may_be_the_mask_of_all_frames():
    pipe = pipeline()
    source = given()["src_video"]
    alone = condition_of(pipe, src_mask=None)
    assert torch.equal(alone, condition_of(pipe, src_mask=np.full_like(source, 255)))
    picture = drawn(*source.shape[1:], seed=3)
    still = condition_of(pipe, src_mask=picture)
    assert torch.equal(still, condition_of(pipe, src_mask=np.stack([picture] * len(source))))
    assert not torch.equal(still, alone)


def test_a_scale_of_zero_is_the_transformer_without_its_own_blocks():
    pipe = pipeline()
    plain = WanTransformer3DModel(**{k: v for k, v in pipe.transformer.config.items() if not k.startswith("vace")})
    plain.load_state_dict(pipe.transformer.state_dict(), strict=False)
    own = pipeline()
    latents, timestep, text = torch.randn(1, 16, *vace_pipelines.LATENTS), torch.tensor([500]), torch.randn(1, 512, 32)
    with torch.no_grad():
        exact = plain.eval()(latents, timestep, text, return_dict=False)[0]
        for scale in (0.0, 0.5):
            guidance = own.guide((text, text), condition_of(own, context_scale=scale)).prompt
            is_same = relative_error(own.predict(latents, timestep, guidance), exact) < 1e-6
            assert is_same == (scale == 0)


@pytest.mark.parametrize("seed", (1, 2))
def test_generate_fits_the_source_and_says_the_same_as_condition_and_sample(seed, monkeypatch):
    pipe = pipeline(steps=1)
    seen = []
    monkeypatch.setattr(pipe, "tokenize", lambda prompts: (None, None))
    monkeypatch.setattr(pipe, "encode_text", lambda ids, mask: torch.ones(2, 512, 32))
    pipe.text_encoder = torch.nn.Identity()
    monkeypatch.setattr(pipe, "decode", lambda latents: seen.append(latents) or torch.zeros(1, 3, 5, *SIZE[::-1]))
    pipe.generate("A cat", seed=seed, context_scale=0.5, **given())
    # 90 by 110 pixels are 5 by 6 tokens, of 7 frames 5.
    condition = pipe.condition(context_scale=0.5, **given())
    assert condition.context_scale == 0.5 and condition.shape == (96, 3, 12, 10)
    noise = torch.randn(1, 16, *condition.shape[1:], generator=torch.Generator().manual_seed(seed))
    text = torch.ones(1, 512, 32)
    assert torch.equal(seen[0], pipe.sample(text, text, noise=noise, conditions=condition))


def test_a_video_is_no_longer_than_its_source_and_no_larger():
    pipe = pipeline()
    source = SourceVideo(drawn(11, 277, 143, 3), fps=10)
    for asked, size in (((832, 480), (128, 256)), ((64, 64), (32, 96))):
        request = VideoRequest("", VideoSettings(asked, 81), pipe.sampling, src_video=source)
        video = fitted(pipe.kind, request)
        assert (video.size, video.frame_num) == (size, 9)


def test_both_branches_as_one_batch_give_the_same(monkeypatch):
    pipe = pipeline()
    condition = condition_of(pipe)
    exact = sample(pipe, condition)
    monkeypatch.setattr("wan.models.wan.memory.has_room_for_both", lambda transformer, latents: True)
    assert relative_error(sample(pipe, condition), exact) < 1e-5


def test_threshold_one_equals_dense_and_layers_count_through_both_lists():
    pipe = pipeline()
    condition = condition_of(pipe)
    dense = sample(pipe, condition)
    tile = (1, 4, 4)
    wan.apply_attention(pipe.transformer, NablaConfig(threshold=1.0, tile=tile))
    assert relative_error(sample(pipe, condition), dense) < 1e-5
    wan.apply_attention(pipe.transformer, NablaConfig(threshold=0.4, tile=tile))
    assert len(applied_attention(pipe.transformer).layers) == 2 + 3
    assert relative_error(sample(pipe, condition), dense) > 1e-4
    wan.apply_attention(pipe.transformer, NablaConfig(threshold=0.4, tile=tile, dense_layers=(0, 1, 2, 3, 4)))
    assert torch.equal(sample(pipe, condition), dense)
    with pytest.raises(InputError, match="layers are 0 to 4"):
        wan.apply_attention(pipe.transformer, NablaConfig(threshold=0.4, dense_layers=(5,)))


@pytest.mark.parametrize("kept", (0, 1, 3, 5))
def test_streamed_blocks_of_both_lists_give_the_same(kept):
    pipe = pipeline()
    condition = condition_of(pipe)
    exact = sample(pipe, condition)
    stream_blocks(pipe.transformer, list(blocks_of(pipe.transformer)), CPU, kept, left_out=blocks_left_out)
    assert torch.equal(sample(pipe, condition), exact)


@pytest.mark.parametrize("streamed", (False, True))
def test_taylorseer_goes_on_along_a_line_and_leaves_out_blocks_of_both_lists(streamed):
    pipe = pipeline(steps=6)
    condition = condition_of(pipe)
    own = VACE_TRANSFORMER.output_of(pipe.transformer)
    expected = sample_by_lines(pipe, own, partial(sample, pipe, condition), computed=(0, 2, 4))
    cache = apply_cache(pipe.transformer, CacheSettings("taylorseer", interval=2, warmup=0.2), VACE_TRANSFORMER)
    if streamed:
        stream_blocks(pipe.transformer, list(blocks_of(pipe.transformer)), CPU, left_out=blocks_left_out)
    ran = [0] * 5
    for number, block in enumerate(blocks_of(pipe.transformer)):
        block.attn1.register_forward_hook(lambda *_, number=number: ran.__setitem__(number, ran[number] + 1))
    assert relative_error(sample(pipe, condition), expected) < 1e-6
    assert (cache.reused, cache.forwards) == (6, 12) and ran == [6] * 5


def sample_by_lines(pipe, output, sampled, computed):
    """The slow twin: every block runs in every step, and of the other steps what the last layer gives is replaced."""
    steps, before = {}, {}

    def replace(_, args, out):
        branch = "prompt" if len(before) % 2 == 0 else "negative"
        step = len(before) // 2
        before[len(before)] = None
        known = steps.setdefault(branch, [])
        if step in computed:
            known.append((step, out))
            return out
        (last, value), *others = known[::-1]
        slope = (value - others[0][1]) / (last - others[0][0]) if others else torch.zeros_like(value)
        return value + slope * (step - last)

    hook = output.register_forward_hook(replace)
    try:
        return sampled()
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", ("first_block", "mag"))
def test_caches_that_add_hints_twice_are_refused(kind):
    settings = CacheSettings(kind, ratios=(1.0,) if kind == "mag" else None)
    with pytest.raises(InputError, match=f"cache {kind} does not work with WanVACETransformer3DModel.*taylorseer"):
        apply_cache(vace_pipelines.transformer(), settings, VACE_TRANSFORMER)


def test_feed_forwards_and_linear_layers_of_both_lists_are_taken():
    transformer = vace_pipelines.transformer()
    fuse_gelu(transformer)
    assert all(type(block.ffn.net[0]) is FusedGELU for block in (*transformer.vace_blocks, *transformer.blocks))
    layers = Quantizer(transformer, blocks_of(transformer), "int8", CPU, CPU).layers
    assert {"vace_blocks.0.proj_in.weight", "vace_blocks.1.proj_out.weight", "blocks.2.attn1.to_q.weight"} <= layers


@pytest.mark.parametrize(
    "changes, said",
    (
        ({"src_video": None}, "src_mask says which parts.*src_video"),
        ({"image": drawn(96, 80, 3)}, "image is not taken by this checkpoint"),
        ({"src_mask": drawn(6, 110, 90, 3)}, "src_mask has 6 frames, and src_video 7; a mask"),
        ({"src_mask": drawn(7, 90, 110, 3)}, "src_mask is 110x90, and src_video 90x110"),
        ({"src_video": drawn(7, 110, 90)}, r"src_video is \(7, 110, 90\), uint8; give a path, or an array"),
        ({"src_ref_images": drawn(50, 70, 3)[:, :, 0]}, "src_ref_images of shape"),
        ({"context_scale": -1.0}, "context_scale -1.0"),
        ({"size": (80, 90)}, "size 80.90: both must be"),
    ),
)
def test_what_cannot_be_is_one_line(changes, said):
    with pytest.raises(InputError, match=said):
        condition_of(pipeline(), **changes)


def test_a_scale_is_refused_where_nothing_is_added(nano):
    pipe = wan.WanT2V.from_pretrained(nano)
    with pytest.raises(InputError, match="context_scale is not taken"):
        pipe.generate("A cat", context_scale=0.5)


def test_conditions_that_are_missing_or_do_not_fit_are_refused():
    pipe = pipeline()
    with pytest.raises(InputError, match="conditions are missing"):
        sample(pipe, None)
    with pytest.raises(InputError, match=r"must be \(96, 3, 12, 10\) beside noise"):
        sample(pipe, torch.zeros(96, 2, 12, 10))


def test_offloaded_models_give_the_same_context():
    pipe = pipeline()
    exact = condition_of(pipe)
    pipe.offload = True
    with on_device(pipe.transformer, CPU, True):
        assert torch.equal(condition_of(pipe), exact)
