"""The op put into diffusers' own pipelines, and taken out again."""

from __future__ import annotations

import copy
import io
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import diffusers_pipeline
import numpy as np
import pytest
import torch
import weight_files
from conftest import relative_error
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from PIL import Image
from torch._dynamo.testing import CompileCounter
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import nabla
import wan
from nabla import InputError, NablaConfig
from nabla.rotary import Rotary, rotate
from wan.attention.steps import StepCounter

CONFIG = NablaConfig(threshold=0.4, window=(1, 1, 1), tile=(1, 4, 4), pool=(1, 2, 2))


def tiny_transformer(seed: int, kind=WanTransformer3DModel, **changes):
    torch.manual_seed(seed)
    settings = dict(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
    )
    return kind(**settings | changes).eval()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4).eval()


def text_states(seed: int) -> torch.Tensor:
    return torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(seed))


def run(pipe, **inputs) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=text_states(1),
        negative_prompt_embeds=text_states(2),
        height=96,
        width=80,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **({} if "segment_frame_length" in inputs else {"num_frames": 9}),
        **inputs,
    ).frames


def t2v(vae):
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = WanPipeline(None, None, vae, scheduler, transformer=tiny_transformer(0))
    return pipe, [pipe.transformer], {}


def two_experts(vae):
    scheduler = FlowMatchEulerDiscreteScheduler()
    first, second = tiny_transformer(0), tiny_transformer(1)
    pipe = WanPipeline(None, None, vae, scheduler, transformer=first, transformer_2=second, boundary_ratio=0.9)
    return pipe, [first, second], {}


def i2v(vae, last: bool = False):
    places = {"pos_embed_seq_len": 2 * 257} if last else {}
    transformer = tiny_transformer(0, in_channels=36, image_dim=24, added_kv_proj_dim=24, **places)
    pipe = from_pictures(vae, transformer, image_encoder=image_encoder(), image_processor=CLIPImageProcessor())
    return pipe, [transformer], {"image": drawn()[0]} | ({"last_image": drawn()[1]} if last else {})


def flf2v(vae):
    return i2v(vae, last=True)


def i2v_of_two_experts(vae):
    first, second = (tiny_transformer(seed, in_channels=36) for seed in (0, 1))
    pipe = from_pictures(vae, first, transformer_2=second, boundary_ratio=0.9)
    return pipe, [first, second], {"image": drawn()[0]}


def ti2v(vae):
    transformer = tiny_transformer(0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return WanPipeline(None, None, vae, scheduler, transformer, expand_timesteps=True), [transformer], {}


def ti2v_from_a_picture(vae):
    transformer = tiny_transformer(0)
    return from_pictures(vae, transformer, expand_timesteps=True), [transformer], {"image": drawn()[0]}


def from_pictures(vae, transformer, **others) -> WanImageToVideoPipeline:
    seen = {"image_encoder": None, "image_processor": None} | others
    return WanImageToVideoPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(), transformer=transformer, **seen)


def image_encoder() -> CLIPVisionModel:
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
    return CLIPVisionModel(CLIPVisionConfig(image_size=224, **sizes)).eval()


def drawn(height: int = 96, width: int = 80, count: int = 9) -> list[Image.Image]:
    frames = np.random.default_rng(0).integers(0, 255, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in frames]


def vace(vae):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    transformer = tiny_transformer(0, WanVACETransformer3DModel, num_layers=3, vace_layers=[0, 2])
    pipe = WanVACEPipeline(None, None, vae, scheduler, transformer=transformer)
    masks = [frame.point(lambda level: 255 * (level > 128)) for frame in drawn()]
    return pipe, [transformer], {"video": drawn(), "mask": masks}


def animate(vae):
    """Of faces of 16 pixels, which the last of two blocks does not see."""
    transformer = tiny_transformer(
        0,
        WanAnimateTransformer3DModel,
        **dict(in_channels=36, latent_channels=16, image_dim=24, added_kv_proj_dim=24),
        **dict(motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8),
        **dict(motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=16, face_encoder_num_heads=2),
        inject_face_latents_blocks=2,
    )
    own = {"image_processor": CLIPImageProcessor(), "image_encoder": image_encoder(), "transformer": transformer}
    pipe = WanAnimatePipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(), **own)
    given = {"image": drawn()[0], "pose_video": drawn(), "face_video": drawn(16, 16)}
    return pipe, [transformer], given | {"segment_frame_length": 9, "guidance_scale": 5.0}


def has(transformer) -> tuple[set, ...]:
    """Names of attributes, and numbers of hooks."""
    return set(vars(transformer)), set(transformer._forward_pre_hooks), set(transformer._forward_hooks)


def blocks_of(transformer) -> list:
    return [*getattr(transformer, "vace_blocks", ()), *transformer.blocks]


class OracleProcessor(WanAttnProcessor):
    """diffusers' own processor with the kept blocks as a token mask, on the grid that the test's video has."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k = (rotate(x.unflatten(2, (attn.heads, -1)), Rotary(*rotary_emb)) for x in (q, k))
        kept = nabla.select_blocks(q, k, self.grid, CONFIG)
        place = torch.cartesian_prod(*map(torch.arange, self.grid)) // torch.tensor(CONFIG.tile)
        tiles = [-(-n // t) for n, t in zip(self.grid, CONFIG.tile)]
        block = (place[:, 0] * tiles[1] + place[:, 1]) * tiles[2] + place[:, 2]
        mask = kept[:, :, block][:, :, :, block]
        return super().__call__(attn, hidden_states, None, mask, rotary_emb)


@pytest.mark.parametrize(
    "make", (t2v, i2v, flf2v, two_experts, i2v_of_two_experts, ti2v, ti2v_from_a_picture, vace, animate)
)
def test_equals_the_oracle_and_comes_out_without_a_trace(vae, make):
    pipe, transformers, inputs = make(vae)
    attentions = [block.attn1 for transformer in transformers for block in blocks_of(transformer)]
    processors, dense = [one.processor for one in attentions], run(pipe, **inputs)
    before = [has(one) for one in transformers]
    wan.apply_attention(transformers, CONFIG)
    sparse = run(pipe, **inputs)
    wan.remove_attention(transformers)
    assert np.array_equal(dense, run(pipe, **inputs))
    assert all(one.processor is processor for one, processor in zip(attentions, processors))
    assert [has(one) for one in transformers] == before
    for one in attentions:
        # The picture of who is animated is a frame more.
        one.set_processor(OracleProcessor((4 if make is animate else 3, 6, 5)))
    oracle = run(pipe, **inputs)
    assert np.abs(sparse - oracle).max() < 1e-4
    assert np.abs(sparse - dense).max() > 1e-3


def test_steps_are_counted_over_both_experts_and_blocks_are_kept_by_each(vae):
    """Of three steps the first is the expert's of high noise; one that is given alone counts its own."""
    pipe, transformers, _ = two_experts(vae)
    pairs = (
        (replace(CONFIG, dense_steps=2), (NablaConfig(), replace(CONFIG, dense_steps=1))),
        (replace(CONFIG, mask_refresh=2), (replace(CONFIG, mask_refresh=2),) * 2),
    )
    made = []
    for together, apart in pairs:
        wan.apply_attention(transformers, together)
        made.append(run(pipe))
        for transformer, config in zip(transformers, apart):
            wan.apply_attention(transformer, config)
        assert np.array_equal(run(pipe), made[-1])
    assert not np.array_equal(*made)


def test_the_pipeline_of_diffusers_with_a_lora_and_offloaded_blocks_equals_ours(nano, tmp_path):
    factors = weight_files.draw_factors(wan.WanT2V.from_pretrained(nano, "dense").transformer)
    lora = weight_files.write_lora(tmp_path / "style.safetensors", factors, "diffusers")
    offloaded = []

    def prepare(transformer):
        diffusers_pipeline.offload_blocks(transformer)
        offloaded.extend(list(block._diffusers_hook.hooks) for block in transformer.blocks)

    exact = diffusers_pipeline.own_latents(nano, lora)
    none = weight_files.write_lora(tmp_path / "none.safetensors", {k: (a, 0 * b) for k, (a, b) in factors.items()})
    assert relative_error(diffusers_pipeline.own_latents(nano, none), exact) > 0.1
    for latents in (
        diffusers_pipeline.latents_of_diffusers(nano, lora),
        diffusers_pipeline.latents_of_diffusers(nano, lora, prepare),
    ):
        assert relative_error(latents, exact) < 1e-5
    assert offloaded and all("group_offloading" in hooks for hooks in offloaded)


def forward(transformer, timestep=500.0, seed=0):
    latents = torch.randn(1, 16, 3, 12, 10, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return transformer(latents, torch.tensor([timestep]), text_states(1), return_dict=False)[0]


def test_fused_projections_give_the_same():
    transformer = tiny_transformer(0)
    wan.apply_attention(transformer, CONFIG)
    apart = forward(transformer)
    transformer.fuse_qkv_projections()
    torch.testing.assert_close(forward(transformer), apart)


def test_threshold_one_equals_dense():
    transformer = tiny_transformer(0)
    dense = forward(transformer)
    wan.apply_attention(transformer, NablaConfig(threshold=1))
    assert (forward(transformer) - dense).abs().max() < 1e-5


def test_dense_layers_and_dense_steps_are_bit_equal_to_dense():
    transformer = tiny_transformer(0)
    dense = forward(transformer)
    wan.apply_attention(transformer, NablaConfig(threshold=0.3, tile=(1, 4, 4), dense_layers=(0, 1)))
    assert torch.equal(forward(transformer), dense)
    for algorithm in ("nabla-0.3", "sta-1-1-1", "nabla-0.3_sta-1-1-1", "keep-0.2"):
        config = nabla.NablaConfig.from_dict({"algorithm": algorithm, "tile": (1, 4, 4), "dense_steps": 2})
        wan.apply_attention(transformer, config)
        at = {t: forward(transformer, t) for t in (900.0, 800.0, 700.0)}
        wan.remove_attention(transformer)
        assert [torch.equal(out, forward(transformer, t)) for t, out in at.items()] == [True, True, False]


def test_one_layer_dense_differs_from_all_and_none():
    transformer = tiny_transformer(0)
    results = []
    for layers in ((), (0,), (1,), (0, 1)):
        wan.apply_attention(transformer, NablaConfig(threshold=0.3, tile=(1, 4, 4), dense_layers=layers))
        results.append(forward(transformer))
    assert all(not torch.equal(a, b) for n, a in enumerate(results) for b in results[:n])


def test_steps_are_counted_over_guidance_branches_experts_and_videos():
    counter = StepCounter()
    seen = [counter.step_of(torch.tensor([float(t), float(t)])) for t in (999, 999, 800, 800, 600, 999, 900, 950)]
    assert seen == [0, 0, 1, 1, 2, 0, 1, 0]


def test_a_video_begins_where_timesteps_rise_and_where_the_loop_tells_its_first_step():
    counter, videos = StepCounter(), []
    for timestep in (999.0, 999.0, 800.0, 999.0, 900.0, 950.0):
        counter.step_of(torch.tensor([timestep]))
        videos.append(counter.video)
    assert videos == [1, 1, 1, 2, 2, 3]
    for step in (0, 1, 2, 0, 1, None):
        counter.set_step(step)
        videos.append(counter.video)
    assert videos[6:] == [4, 4, 4, 5, 5, 5]
    # What comes after the loop is another video, of whatever timestep.
    counter.step_of(torch.tensor([0.0]))
    assert counter.video == 6


def test_the_loop_tells_the_steps_whatever_came_before(random_nano):
    config = nabla.NablaConfig(threshold=0.3, tile=(1, 4, 4), dense_steps=2)
    settings = dict(size=(96, 80), frame_num=5, seed=0, steps=4)
    video = wan.WanT2V.from_pretrained(random_nano, config).generate("a cat", **settings)
    pipe = wan.WanT2V.from_pretrained(random_nano, config)
    pipe.generate("a dog", **settings | {"steps": 1, "solver": "dpm++"})
    assert (pipe.generate("a cat", **settings) == video).all()


def test_masks_are_kept_for_steps_and_over_guidance_branches_but_not_over_videos(random_nano, monkeypatch):
    attention, chosen = sys.modules["nabla.attention"], []
    original = attention.choose_block_mask
    monkeypatch.setattr(attention, "choose_block_mask", lambda *args: chosen.append(0) or original(*args))
    settings = dict(size=(96, 80), frame_num=5, seed=0, steps=5)
    config = NablaConfig(threshold=0.3, tile=(1, 4, 4))
    plain = wan.WanT2V.from_pretrained(random_nano, config).generate("a cat", **settings)
    pipe = wan.WanT2V.from_pretrained(random_nano, replace(config, mask_refresh=2))
    video = pipe.generate("a cat", **settings)
    layers = len(pipe.transformer.blocks)
    assert len(chosen) == 3 * layers
    assert (pipe.generate("a cat", **settings) == video).all() and len(chosen) == 6 * layers
    assert (video != plain).any()
    assert "masks kept for 2 steps" in pipe.describe_attention(wan.config.settings.VideoSettings((96, 80), 5))
    wan.apply_attention(pipe.transformer, config)
    assert (pipe.generate("a cat", **settings) == plain).all() and len(chosen) == 6 * layers


def test_kept_masks_follow_timesteps_where_no_loop_tells_the_steps():
    transformer = tiny_transformer(0)
    wan.apply_attention(transformer, replace(CONFIG, mask_refresh=3))
    layer, reused = transformer.nabla.layers[0], []
    for timestep in (900.0, 900.0, 800.0, 700.0, 600.0, 600.0, 900.0):
        forward(transformer, timestep)
        reused.append(layer.block_mask.reuse)
    assert reused == [False, True, True, True, False, True, False]
    for shape in ((2, 16, 3, 12, 10), (1, 16, 3, 10, 12), (1, 16, 3, 12, 10)):
        with torch.inference_mode():
            latents, timestep = torch.randn(shape), torch.full(shape[:1], 800.0)
            transformer(latents, timestep, text_states(shape[0]), return_dict=False)
        assert not layer.block_mask.reuse and layer.block_mask.mask.shape[0] == shape[0]
    forward(transformer, 950.0)
    assert not layer.block_mask.reuse
    transformer.train()
    forward(transformer, 700.0)
    assert layer.block_mask is None


def test_masks_of_one_video_are_not_taken_for_the_same_steps_of_the_next():
    """Of the same size, and so early that the masks of the first would be fresh enough."""
    transformer, config = tiny_transformer(0), replace(CONFIG, mask_refresh=3)
    latents = torch.randn(2, 1, 16, 3, 12, 10, generator=torch.Generator().manual_seed(1))

    def last_of(videos: torch.Tensor) -> torch.Tensor:
        wan.apply_attention(transformer, config)
        with torch.no_grad():
            steps = [(video, torch.tensor([timestep])) for video in videos for timestep in (900.0, 800.0)]
            return [transformer(*step, text_states(1), return_dict=False)[0] for step in steps][-1]

    assert torch.equal(last_of(latents), last_of(latents[1:]))


def test_masks_of_a_forward_before_sampling_are_not_taken_for_its_first_step(random_nano):
    pipe = wan.WanT2V.from_pretrained(random_nano, NablaConfig(threshold=0.3, tile=(1, 4, 4), mask_refresh=2))
    draw = torch.Generator().manual_seed(0)
    noise, other = torch.randn(2, 1, 16, 2, 12, 10, generator=draw)
    text = torch.randn(1, 7, pipe.transformer.config.text_dim, generator=draw)
    wanted = pipe.sample(text, noise=noise, steps=2, guide_scale=1.0)
    with torch.no_grad():
        pipe.transformer(other, torch.tensor([500.0]), text, return_dict=False)
    assert torch.equal(pipe.sample(text, noise=noise, steps=2, guide_scale=1.0), wanted)


def test_masks_of_a_forward_that_failed_are_not_taken():
    transformer = tiny_transformer(0)
    wan.apply_attention(transformer, CONFIG)
    plain = forward(transformer, 900.0)
    wan.apply_attention(transformer, replace(CONFIG, mask_refresh=3))
    fail = transformer.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(transformer, 900.0)
    fail.remove()
    assert torch.equal(forward(transformer, 900.0), plain)


def test_kept_masks_are_freed_after_sampling_and_do_not_depend_on_the_way_of_guidance(random_nano, monkeypatch):
    settings = dict(size=(96, 80), frame_num=5, seed=0, steps=4)
    config = NablaConfig(threshold=0.3, tile=(1, 4, 4), pool=(1, 2, 4), dropped="mean", mask_refresh=2)
    pipe = wan.WanT2V.from_pretrained(random_nano, config)
    video = pipe.generate("a cat", **settings)
    assert all(layer.block_mask is None for layer in pipe.transformer.nabla.layers)
    monkeypatch.setattr(wan.models.wan.memory, "has_room_for_both", lambda *_: True)
    assert (pipe.generate("a cat", **settings) == video).all()


def test_compiled_blocks_see_one_graph_more_with_kept_masks():
    transformer = tiny_transformer(0, num_layers=3)
    counter = CompileCounter()
    for block in transformer.blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=False)
    wan.apply_attention(transformer, replace(CONFIG, mask_refresh=3))
    for timestep in (900.0, 900.0, 800.0, 700.0, 600.0, 600.0, 900.0):
        forward(transformer, timestep)
    assert counter.frame_count == 2


def test_autocast_runs_in_its_dtype():
    transformer = tiny_transformer(0)
    wan.apply_attention(transformer, CONFIG)
    exact = forward(transformer)
    with torch.autocast("cpu", torch.bfloat16):
        assert (forward(transformer) - exact).norm() < 0.1 * exact.norm()


def test_training_never_counts_steps():
    transformer = tiny_transformer(0)
    wan.apply_attention(transformer, NablaConfig(threshold=0.3, tile=(1, 4, 4), dense_steps=5))
    sparse = replace(transformer.nabla.config, dense_steps=0)
    transformer.train()
    trained = forward(transformer)
    wan.apply_attention(transformer, sparse)
    assert torch.equal(forward(transformer), trained)


def test_a_transformer_that_has_run_can_be_copied_pickled_and_trained():
    transformer = tiny_transformer(0)
    wan.apply_attention(transformer, CONFIG)
    with torch.inference_mode():
        latents = torch.randn(1, 16, 3, 12, 10)
        transformer(latents, torch.tensor([500.0]), text_states(1))
    again = copy.deepcopy(transformer)
    assert torch.equal(forward(again), forward(transformer))
    torch.save(transformer, io.BytesIO())
    latents = torch.randn(1, 16, 3, 12, 10)
    transformer(latents, torch.tensor([500.0]), text_states(1), return_dict=False)[0].sum().backward()
    assert transformer.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0
    assert [plan.trains for plan in transformer.nabla.plans.by_size.values()] == [False, True]


def test_a_compiled_transformer_is_patched_inside_its_wrapper():
    transformer = tiny_transformer(0)
    wan.apply_attention(torch.compile(transformer), CONFIG)
    assert transformer.nabla.config == CONFIG
    wan.remove_attention(torch.compile(transformer))
    assert not hasattr(transformer, "nabla")


def test_another_model_and_layers_that_do_not_exist_are_refused(vae):
    with pytest.raises(InputError, match="AutoencoderKLWan is not a WanTransformer3DModel"):
        wan.apply_attention(vae, CONFIG)
    with pytest.raises(InputError, match="dense_layers 2 does not exist; layers are 0 to 1"):
        wan.apply_attention(tiny_transformer(0), NablaConfig(threshold=0.5, dense_layers=(0, 2)))


def test_nothing_happens_to_no_transformers():
    wan.apply_attention([], CONFIG)
    wan.remove_attention([])


def test_a_processor_of_somebody_else_is_not_replaced():
    transformer = tiny_transformer(0)
    transformer.blocks[0].attn1.set_processor(torch.nn.Identity())
    with pytest.raises(InputError, match="Identity is not diffusers' WanAttnProcessor"):
        wan.apply_attention(transformer, CONFIG)


def test_a_ring_of_processes_is_refused_and_not_passed_by():
    transformer = tiny_transformer(0)
    ring = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2))
    transformer.blocks[0].attn1.processor._parallel_config = ring
    with pytest.raises(InputError, match="which a ring never has; set ulysses_degree alone"):
        wan.apply_attention(transformer, CONFIG)


def test_compiled_blocks_see_one_graph_whatever_step_threshold_prompt_and_layer():
    transformer = tiny_transformer(0, num_layers=3)
    counter = CompileCounter()
    for block in transformer.blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=False)
    for threshold in (0.3, 0.5, 0.7):
        wan.apply_attention(transformer, NablaConfig(threshold=threshold, tile=(1, 4, 4)))
        for timestep in (900.0, 600.0, 300.0):
            forward(transformer, timestep, seed=int(timestep))
    assert counter.frame_count == 1
    wan.apply_attention(transformer, NablaConfig(threshold=0.7, tile=(1, 4, 4), dense_steps=1))
    for timestep in (900.0, 600.0, 300.0):
        forward(transformer, timestep)
    assert counter.frame_count == 2


@torch.no_grad()
def test_of_two_forwards_at_once_the_one_that_cannot_be_right_raises():
    """What layers are told is of one forward: a thread's must not go on with the grid of another's."""
    transformer = tiny_transformer(0)
    wan.apply_attention(transformer, NablaConfig(threshold=0.4, tile=(1, 4, 4)))
    wide, context = torch.randn(1, 16, 3, 16, 32), text_states(1)
    high = wide.transpose(3, 4).contiguous()
    right = transformer(wide, torch.tensor([500]), context, return_dict=False)[0]
    begun, go_on, results = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is thread:
            begun.set()
            go_on.wait(30)

    def forward():
        try:
            with torch.no_grad():
                results.append(transformer(wide, torch.tensor([500]), context, return_dict=False)[0])
        except InputError as error:
            results.append(error)

    thread = threading.Thread(target=forward)
    hook = transformer.blocks[1].register_forward_pre_hook(wait)
    thread.start()
    begun.wait(30)
    transformer(high, torch.tensor([500]), context, return_dict=False)
    go_on.set()
    thread.join()
    hook.remove()
    assert isinstance(results[0], InputError) and "one at a time" in str(results[0])
    assert (transformer(wide, torch.tensor([500]), context, return_dict=False)[0] == right).all()


@torch.no_grad()
def test_a_forward_that_begins_while_another_is_told_of_its_grid_keeps_its_own(monkeypatch):
    transformer = tiny_transformer(0)
    wan.apply_attention(transformer, NablaConfig(threshold=0.4, tile=(1, 4, 4)))
    wide, context = torch.randn(1, 16, 3, 16, 32), text_states(1)
    right = transformer(wide, torch.tensor([500]), context, return_dict=False)[0]
    planning, go_on, told, results = threading.Event(), threading.Event(), threading.Event(), []
    plan = nabla.plan

    def slow_plan(*args):
        planning.set()
        go_on.wait(30)
        return plan(*args)

    def wait(*_):
        """The second's layers run when the first's have been told, over which they must not go on."""
        if threading.current_thread() is first:
            told.set()
        else:
            told.wait(30)

    def forward(latents):
        with torch.no_grad(), suppress(InputError):
            results.append(transformer(latents, torch.tensor([500]), context, return_dict=False)[0])

    monkeypatch.setattr(nabla, "plan", slow_plan)
    first = threading.Thread(target=forward, args=(wide.transpose(3, 4).contiguous(),))
    first.start()
    planning.wait(30)
    second = threading.Thread(target=forward, args=(wide,))
    transformer.blocks[0].register_forward_pre_hook(wait)
    second.start()
    # Until it waits, or has set what the first one then writes over.
    second.join(0.2)
    go_on.set()
    first.join()
    second.join()
    alike = [result for result in results if result.shape == right.shape]
    assert len(alike) == 1 and (alike[0] == right).all()
