"""Training of Wan's other kinds: an expert's own timesteps, pictures beside the noise, a first frame that is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from nabla import InputError
from wan.models.training import join_texts
from wan.models.wan.training import TRAINING
from wan.training.clips import Clips
from wan.training.data import MicroBatches, levels_of, validation_batch
from wan.training.objective import add_noise, frame_levels, mse_per_clip, predict_velocity, sigmas_from_quantiles
from wan.training.objective_settings import ObjectiveSettings


@pytest.mark.parametrize("timesteps, shift", (("logit_normal", 5.0), ("uniform", 3.0), ("logit_normal", 12.0)))
@pytest.mark.parametrize("low, high", ((875, None), (None, 900), (200, 700)))
def test_a_range_of_timesteps_leaves_of_the_distribution_what_is_in_it(timesteps, shift, low, high):
    every = ObjectiveSettings(timesteps, shift=shift)
    within = ObjectiveSettings(timesteps, shift=shift, min_timestep=low, max_timestep=high)
    quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    # The slow way: of all levels those between the limits.
    least, most = (low or 0) / 1000, (high or 1000) / 1000
    drawn = sigmas_from_quantiles(quantiles, every)
    kept = drawn[(drawn >= least) & (drawn <= most)].sort().values
    ours = sigmas_from_quantiles((torch.arange(len(kept), dtype=torch.float64) + 0.5) / len(kept), within)
    assert ours.dtype == torch.float32 and least <= ours.min() and ours.max() <= most
    torch.testing.assert_close(ours, kept, atol=5e-3, rtol=0)


def test_limits_that_leave_nothing_out_change_no_bit():
    quantiles = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for timesteps in ("logit_normal", "uniform"):
        every = sigmas_from_quantiles(quantiles, ObjectiveSettings(timesteps))
        limited = ObjectiveSettings(timesteps, min_timestep=0, max_timestep=1000)
        assert torch.equal(sigmas_from_quantiles(quantiles, limited), every)


@pytest.mark.parametrize(
    "limits, message",
    (
        ({"min_timestep": -1}, "min_timestep -1 is not a number at least 0, at most 1000"),
        ({"max_timestep": 1001}, "max_timestep 1001 is not a number at least 0, at most 1000"),
        ({"max_timestep": "all"}, "max_timestep 'all' is not a number"),
        ({"min_timestep": 900, "max_timestep": 875}, "min_timestep 900 is not below max_timestep 875"),
        ({"min_timestep": 1000}, "min_timestep 1000 is not below max_timestep 1000"),
    ),
)
def test_limits_that_are_none_are_refused(limits, message):
    with pytest.raises(InputError, match=message):
        ObjectiveSettings(**limits)


def test_a_range_with_next_to_no_levels_in_it_is_refused():
    narrow = ObjectiveSettings(max_timestep=1e-3)
    with pytest.raises(InputError, match="min_timestep 0 and max_timestep 0.001 hold next to none of the noise levels"):
        sigmas_from_quantiles(torch.tensor([0.5]), narrow)


def test_what_is_given_has_no_noise_and_no_part_in_the_loss():
    generator = torch.Generator().manual_seed(0)
    latents, noise, prediction = (torch.randn(2, 3, 4, 2, 2, generator=generator) for _ in range(3))
    sigmas = torch.stack([frame_levels(torch.tensor(0.25), 4, True), frame_levels(torch.tensor(0.75), 4, False)])
    assert sigmas.tolist() == [[0, 0.25, 0.25, 0.25], [0.75] * 4]
    noisy = add_noise(latents, noise, sigmas)
    losses = mse_per_clip(prediction, noise - latents, sigmas)
    for clip in range(2):
        errors = []
        for frame in range(4):
            level = sigmas[clip, frame].item()
            expected = (1 - level) * latents[clip, :, frame] + level * noise[clip, :, frame]
            torch.testing.assert_close(noisy[clip, :, frame], expected)
            if level:
                target = noise[clip, :, frame] - latents[clip, :, frame]
                errors.append((prediction[clip, :, frame] - target).square().mean().item())
        assert losses[clip].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert torch.equal(noisy[0, :, 0], latents[0, :, 0])


def transformer_of(**changes: Any) -> WanTransformer3DModel:
    """Of random weights, and sizes as small as they may be."""
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2)
    return WanTransformer3DModel(**sizes | {"in_channels": 16, "out_channels": 16} | changes).requires_grad_(False)


def test_frames_of_their_own_levels_are_told_so_token_by_token():
    transformer, latents, text = transformer_of(), torch.randn(2, 16, 3, 4, 6), torch.randn(2, 512, 16)
    sigmas = torch.tensor([[0, 0.5, 0.5], [0.25, 0.25, 0.25]])
    ours = predict_velocity(transformer, latents, sigmas, text)
    for clip in range(2):
        # Six tokens a frame.
        timesteps = [1000 * level for level in sigmas[clip].tolist() for _ in range(6)]
        alone = latents[clip : clip + 1], torch.tensor([timesteps]), text[clip : clip + 1]
        torch.testing.assert_close(ours[clip], transformer(*alone, return_dict=False)[0][0], atol=1e-5, rtol=0)
    # Of one level throughout it is as if the clip had that.
    torch.testing.assert_close(
        ours[1:], predict_velocity(transformer, latents[1:], sigmas[1:, 0], text[1:]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("pictures, changes", ((0, {}), (1, {}), (2, {"pos_embed_seq_len": 10})))
def test_what_stands_beside_the_noise_is_shown_with_it(pictures, changes):
    seen = {"image_dim": 24, "added_kv_proj_dim": 24} if pictures else {}
    transformer = transformer_of(in_channels=36, **seen | changes)
    stored = [{"text": torch.randn(5, 16), "given": torch.randn(16, 3, 4, 6)} for _ in range(2)]
    if pictures:
        stored = [one | {"pictures": torch.randn(pictures, 5, 24)} for one in stored]
    texts = join_texts(torch.stack, [TRAINING.ready(one, 512) for one in stored])
    latents, sigmas = torch.randn(2, 16, 3, 4, 6), torch.tensor([0.5, 0.25])
    ours = predict_velocity(transformer, latents, sigmas, texts)
    mask = torch.zeros(4, 3, 4, 6)
    mask[:, 0] = 1
    if pictures == 2:
        mask[3, 2] = 1
    for clip, own in enumerate(stored):
        text = torch.cat((own["text"], torch.zeros(507, 16)))[None]
        states = own["pictures"] if pictures else None
        expected = transformer(
            torch.cat((latents[clip], mask, own["given"]))[None],
            1000 * sigmas[clip : clip + 1],
            text,
            encoder_hidden_states_image=states,
            return_dict=False,
        )
        torch.testing.assert_close(ours[clip], expected[0][0], atol=1e-5, rtol=0)


def test_first_frames_are_given_as_often_as_asked_and_change_nothing_else(prepared):
    clips = Clips([str(prepared)], 512)
    plain = MicroBatches(clips, ObjectiveSettings(), 3, 4, 4)
    some = MicroBatches(clips, ObjectiveSettings(first_frame=0.3), 3, 4, 4)
    draws = [some.draw(step, place) for step in range(250) for place in range(4)]
    assert 0.25 < sum(draw.gives_first_frame for draw in draws) / 1000 < 0.35
    for step in range(6):
        without, batch = plain[step], some[step]
        assert torch.equal(without.noise, batch.noise) and torch.equal(without.text, batch.text)
        for place, levels in enumerate(batch.sigmas):
            sigma = without.sigmas[place].item()
            gives = some.draw(step, place).gives_first_frame
            assert levels.tolist() == ([0.0, sigma] if gives else [sigma, sigma])
    held_out = [validation_batch(clips, ObjectiveSettings(first_frame=0.5), n, 4).sigmas[0] for n in range(4)]
    assert [levels[0].item() == 0 for levels in held_out] == [False, True, False, True]
    # A picture has no other frame to learn.
    picture = torch.zeros(16, 1, 4, 6)
    assert levels_of(ObjectiveSettings(first_frame=1), torch.tensor(0.5), picture, True).tolist() == [0.5]
