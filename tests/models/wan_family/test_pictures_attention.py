"""Block-sparse attention in Wan's videos from pictures, on a grid that no tile divides."""

from __future__ import annotations

import picture_pipelines
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from picture_pipelines import KINDS, given_to, sample

import nabla
import wan
from nabla import NablaConfig
from nabla.rotary import Rotary, rotate

SIZE, FRAMES, LATENTS, GRID = (80, 96), 9, (3, 12, 10), (3, 6, 5)
CONFIG = NablaConfig(threshold=0.4, window=(1, 1, 1), tile=(1, 4, 4))


class OracleProcessor(WanAttnProcessor):
    """diffusers' own processor with the kept blocks as a mask of tokens."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k = (rotate(x.unflatten(2, (attn.heads, -1)), Rotary(*rotary_emb)) for x in (q, k))
        kept = nabla.select_blocks(q, k, GRID, CONFIG)
        place = torch.cartesian_prod(*map(torch.arange, GRID)) // torch.tensor(CONFIG.tile)
        tiles = [-(-n // t) for n, t in zip(GRID, CONFIG.tile)]
        block = (place[:, 0] * tiles[1] + place[:, 1]) * tiles[2] + place[:, 2]
        return super().__call__(attn, hidden_states, None, kept[:, :, block][:, :, :, block], rotary_emb)


@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_of_one_is_dense_and_less_is_the_oracle(kind):
    pipe = picture_pipelines.pipeline(kind)
    condition = pipe.condition(**given_to(kind), size=SIZE, frame_num=FRAMES)
    dense = sample(pipe, condition, LATENTS)
    wan.apply_attention(pipe.transformers, NablaConfig(threshold=1))
    assert (sample(pipe, condition, LATENTS) - dense).abs().max() < 1e-5
    wan.apply_attention(pipe.transformers, CONFIG)
    sparse = sample(pipe, condition, LATENTS)
    assert (sparse - dense).abs().max() > 1e-3
    wan.remove_attention(pipe.transformers)
    for transformer in pipe.transformers:
        for block in transformer.blocks:
            block.attn1.set_processor(OracleProcessor())
    assert (sample(pipe, condition, LATENTS) - sparse).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_of_both_branches_and_of_two_videos_is_each_alone(kind, monkeypatch):
    pipe = picture_pipelines.pipeline(kind)
    wan.apply_attention(pipe.transformers, CONFIG)
    condition = pipe.condition(**given_to(kind), size=SIZE, frame_num=FRAMES)
    two = sample(pipe, condition, LATENTS, batch=2)
    monkeypatch.setattr("wan.models.wan.memory.has_room_for_both", lambda *_: True)
    assert (sample(pipe, condition, LATENTS, batch=2) - two).abs().max() < 1e-4
    assert (sample(pipe, condition, LATENTS) - two[:1]).abs().max() < 1e-4
