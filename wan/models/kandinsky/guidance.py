"""What guides a video: texts and a picture as the transformer takes them, on all processes that share it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from wan.parallel.distributed import DistributedContext
from wan.sampling.loop import Conditions
from wan.sampling.request import VideoRequest
from wan.sampling.texts import pad_rows, require_negative


class Encoders(Protocol):
    """What is asked of the pipeline: its encoders, of which a process that does not lead has none."""

    transformer: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    device: torch.device
    text_length: int
    distributed: DistributedContext | None

    def tokenize(self, prompts: list[str], still: bool) -> tuple[Tensor, Tensor]: ...
    def tokenize_pooled(self, prompts: list[str]) -> tuple[Tensor, Tensor]: ...
    def encode_text(self, ids: Tensor, mask: Tensor, still: bool) -> list[Tensor]: ...
    def encode_pooled(self, ids: Tensor, mask: Tensor) -> Tensor: ...
    def encode_picture(self, picture: np.ndarray, size: tuple[int, int], seed: int | None) -> Tensor: ...


class Guidance(NamedTuple):
    """What a guidance branch is made by.

    text: (B, text length, C), padded; rows: (B, text length) bool, which are text; pooled: (B, P)
    first_frame: latents (B, C, 1, h, w) of a picture that the video begins with
    """

    text: Tensor
    rows: Tensor
    pooled: Tensor
    first_frame: Tensor | None = None

    def expand(self, batch: int) -> Guidance:
        """The same for each of a batch."""
        return Guidance(*(None if x is None else x.expand(batch, *x.shape[1:]) for x in self))

    def beside(self, other: Guidance) -> Guidance:
        """Both as one batch, this one first."""
        return Guidance(*(None if one is None else torch.cat((one, two)) for one, two in zip(self, other)))


def rows_of(lengths: Tensor, most: int) -> Tensor:
    """Which of `most` rows are text, (B, most) bool, of texts of so many rows (B,)."""
    return torch.arange(most, device=lengths.device) < lengths[:, None]


def given_conditions(
    pipe: Encoders,
    states: tuple[Tensor, Tensor],
    negative: tuple[Tensor | None, Tensor | None],
    first_frame: Tensor | None,
    guide_scale: float,
) -> Conditions:
    """The branches of text states and pooled ones that are given, the negative ones where there is guidance."""
    prompt = guidance_of(pipe, *states, first_frame)
    if guide_scale == 1:
        return Conditions(prompt)
    text, pooled = (require_negative(x, guide_scale) for x in negative)
    return Conditions(prompt, guidance_of(pipe, text, pooled, first_frame))


def guidance_of(pipe: Encoders, text: Tensor, pooled: Tensor, first_frame: Tensor | None) -> Guidance:
    """A branch of states (L, C) and (1, P), or of a batch of such, all rows of which are text."""
    text, pooled = (x.to(pipe.device, pipe.transformer.dtype) for x in (text, pooled))
    text = text if text.ndim == 3 else text[None]
    rows = rows_of(torch.full((len(text),), text.shape[1], device=text.device), pipe.text_length)
    return Guidance(pad_rows(text, pipe.text_length), rows, pooled.view(len(text), -1), first_frame)


def encode_request(pipe: Encoders, request: VideoRequest) -> Conditions:
    """What a request's prompts and picture guide by: those who have the models encode, and all get the leader's."""
    sampling = request.sampling
    prompts = [request.prompt, sampling.negative_prompt] if sampling.guided else [request.prompt]
    text, lengths = _texts(pipe, prompts, still=request.video.frame_num == 1)
    first_frame = None if request.image is None else from_leader(pipe, _first_frame(pipe, request))
    given = from_leader(pipe, text), rows_of(from_leader(pipe, lengths), pipe.text_length)
    pooled = from_leader(pipe, _pooled(pipe, prompts))
    branches = zip(*(x.split(1) for x in (*given, pooled)))
    return Conditions(*(Guidance(*branch, first_frame) for branch in branches))


def from_leader(pipe: Encoders, x: Tensor) -> Tensor:
    """The leader's tensor on all processes that share a video."""
    return x if pipe.distributed is None else pipe.distributed.broadcast_from_leader(x.contiguous())


def _texts(pipe: Encoders, prompts: list[str], still: bool) -> tuple[Tensor, Tensor]:
    """States (prompts, text length, C), padded, and how many rows each has. still: of single pictures"""
    if pipe.text_encoder is None:
        shape = len(prompts), pipe.text_length, pipe.transformer.config.in_text_dim
        lengths = torch.empty(len(prompts), dtype=torch.int64, device=pipe.device)
        return torch.empty(shape, device=pipe.device, dtype=pipe.transformer.dtype), lengths
    states = pipe.encode_text(*pipe.tokenize(prompts, still), still)
    lengths = torch.tensor([len(text) for text in states], device=pipe.device)
    return torch.stack([pad_rows(text, pipe.text_length) for text in states]), lengths


def _pooled(pipe: Encoders, prompts: list[str]) -> Tensor:
    if pipe.text_encoder_2 is not None:
        return pipe.encode_pooled(*pipe.tokenize_pooled(prompts))
    shape = len(prompts), pipe.transformer.config.in_text_dim2
    return torch.empty(shape, device=pipe.device, dtype=pipe.transformer.dtype)


def _first_frame(pipe: Encoders, request: VideoRequest) -> Tensor:
    video = request.video
    if pipe.vae is not None:
        assert request.image is not None
        return pipe.encode_picture(request.image, video.size, request.sampling.seed)
    channels, (_, height, width) = pipe.transformer.config.out_visual_dim, video.latents_size
    return torch.empty(1, channels, 1, height, width, device=pipe.device)
