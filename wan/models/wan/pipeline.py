"""Text to video: the three stages between a prompt and frames. Pipelines of other kinds are made from it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nabla import InputError
from wan.caches.applied import step_cache_of
from wan.checkpoints.file_errors import CheckpointError
from wan.config.model_settings import LoraFile
from wan.config.prompts import check_prompt
from wan.config.settings import SamplingSettings, VideoSettings, changed
from wan.memory.placement import on_device
from wan.memory.planner import MemoryPlan
from wan.models import pretrained
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components, memory
from wan.models.wan.condition import Condition, Guidance, both_branches, guidance_of
from wan.models.wan.inputs import request_of
from wan.models.wan.kinds import KINDS, Kind
from wan.models.wan.latents import decode, draw_noise, encode, glimpse
from wan.models.wan.loading import load_models
from wan.models.wan.processor import TRANSFORMER, velocity_of
from wan.models.wan.text import cut_note, pad_text, tokenize
from wan.observe.observer import Observer
from wan.observe.recorder import with_progress
from wan.parallel.distributed import DistributedContext
from wan.sampling.finite import check_decoded
from wan.sampling.guided import make_video, sample_latents
from wan.sampling.loop import Conditions
from wan.sampling.request import VideoRequest
from wan.sampling.texts import CutNotes, pad_rows, require_negative

if TYPE_CHECKING:
    from wan.caches.base import StepCache


class WanT2V:
    """Wan's videos of text alone, by one transformer or by two experts.

    Build with `from_pretrained`, see `wan.models.pretrained`.

    transformer: diffusers' `WanTransformer3DModel`; text states may be given unpadded, (B, L, C)
    transformer_2: the expert of low noise, where `transformer` is that of high noise; None where there is one for all
    boundary: from which share of the 1,000 timesteps on the expert of high noise runs
    vae: diffusers' `AutoencoderKLWan`, its encoder in float32
    text_encoder: transformers' `UMT5EncoderModel`
    image_encoder: transformers' `CLIPVisionModel`, where the transformer sees pictures by it
    sampling, video: the settings that `generate` uses where it is given none
    processes: those that share the work, kept as `distributed`, or None for this one alone. Of those that share a
        video one leads: only it has a VAE, a text encoder unless that is sharded, and the result
    seconds: how long each stage of the last `generate` took
    plan: of memory, by which the models were loaded, or None
    lora: what was merged into the transformer
    """

    transformer_spec = TRANSFORMER
    transformer_component = staticmethod(components.transformer_component)
    load_models = staticmethod(load_models)
    from_settings = classmethod(pretrained.from_settings)

    def __init__(
        self,
        transformer: nn.Module,
        vae: nn.Module | None,
        text_encoder: nn.Module | None,
        tokenizer: Any,
        device: torch.device,
        text_device: torch.device,
        text_length: int,
        offload: bool,
        sampling: SamplingSettings,
        video: VideoSettings,
        processes: DistributedContext | None = None,
        transformer_2: nn.Module | None = None,
        boundary: float | None = None,
        image_encoder: nn.Module | None = None,
    ):
        self.transformer = transformer
        self.transformer_2 = transformer_2
        self.boundary = boundary
        # The one whose steps are being sampled, see `sample_latents`.
        self.running = transformer
        self.image_encoder = image_encoder
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.device = device
        self.text_device = text_device
        self.text_length = text_length
        self.offload = offload
        self.sampling = sampling
        self.video = video
        self.distributed = processes
        self.seconds: dict[str, float] = {}
        self.plan: MemoryPlan | None = None
        self.lora: Sequence[LoraFile] = ()
        self.cuts = CutNotes(partial(cut_note, tokenizer, length=text_length))
        for one in self.transformers:
            one.register_forward_pre_hook(partial(pad_text, length=text_length), with_kwargs=True)

    @classmethod
    def from_pretrained(cls, path: str | Path | Checkpoint, *args: Any, **options: Any) -> WanT2V:
        """`wan.from_pretrained` of a checkpoint that has to be of this family."""
        return pretrained.from_pretrained(path, *args, **options, pipeline=cls)

    def tokenize(self, prompts: str | list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (B, text length) int64 each, of prompts cleaned as in training.

        Too long ones are cut, which the log says once of each.
        """
        if self.tokenizer is None:
            raise CheckpointError("the checkpoint has no tokenizer, so prompts cannot be read; download it again")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        # Of those that share a video all tokenize where its text encoder is sharded, and one says so.
        if self.is_leader:
            self.cuts.warn(prompts)
        return tokenize(self.tokenizer, prompts, self.text_length)

    def prompt_notes(self, *prompts: str) -> tuple[str, ...]:
        """A line for each prompt that is longer than the text encoder takes."""
        return self.cuts.of(*prompts)

    @torch.no_grad()
    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text states (B, text length, C) of token ids and mask (B, L), zero past each prompt's end."""
        with on_device(self.text_encoder, self.text_device, self.offload) as encoder:
            mask = mask.to(self.text_device)
            states = encoder(ids.to(self.text_device), mask).last_hidden_state * mask[..., None]
        return pad_rows(states.to(self.device, self.transformer.dtype), self.text_length)

    def encode(self, request: VideoRequest) -> Conditions:
        """What guides a video, on all processes that share it: text states (1, text length, C) of its prompts."""
        sampling = request.sampling
        prompts = [request.prompt, sampling.negative_prompt] if sampling.guided else [request.prompt]
        if self.text_encoder is not None:
            states = self.encode_text(*self.tokenize(prompts))
        else:
            shape = len(prompts), self.text_length, self.transformer.config.text_dim
            states = torch.empty(shape, device=self.device, dtype=self.transformer.dtype)
        if self.distributed is not None:
            states = self.distributed.broadcast_from_leader(states.contiguous())
        return self.guide(states.split(1), self._condition_of(request))

    def condition(
        self,
        image: object = None,
        *,
        size: object = None,
        frame_num: int | None = None,
        context_scale: float | None = None,
        **inputs: object,
    ) -> Condition:
        """What stands beside the noise of a video that is made of more than text, on all processes that share it.

        image, context_scale, inputs: as of `generate`; frame_num: of the video
        size: of the video, (width, height), exactly, or None for one in the form of what is given, of about the area of
            `self.video`
        Raises `InputError` as `generate` does, and where nothing is given.
        """
        video = changed(self.video, size=size, frame_num=frame_num)
        sampling = changed(self.sampling, context_scale=context_scale)
        made = self._condition_of(request_of(self.kind, "", video, sampling, {"image": image, **inputs}, bool(size)))
        if made is None:
            raise InputError("no input is given, so nothing stands beside the noise; use sample without conditions")
        return made

    @torch.no_grad()
    def sample(
        self,
        context: Tensor,
        negative_context: Tensor | None = None,
        *,
        noise: Tensor,
        steps: int | None = None,
        shift: float | None = None,
        guide_scale: float | tuple[float, float] | None = None,
        solver: str | None = None,
        progress: bool = False,
        observer: Observer | None = None,
        conditions: Tensor | None = None,
    ) -> Tensor:
        """Denoise float32 noise (B, C, T, h, w) to latents of the same shape, guided by text states (B, L, C).

        `negative_context` is needed unless guide_scale is 1. A single clip may be given, and is returned, unbatched.
        What is not given is taken from `self.sampling`: 50 steps of unipc, shift 5, guide_scale 5 unless the
        checkpoint says else. Processes that share a video must be given the same. progress: show a line, on the first
        process; observer: is told what happens, see `wan.observe.observer`; conditions: what `condition` gave. Raises
        `InputError` for settings outside what is allowed, and for latents not finite.
        """
        sampling = changed(self.sampling, steps=steps, shift=shift, guide_scale=guide_scale, solver=solver)
        if sampling.guided:
            require_negative(negative_context, sampling.guide_scale)
        latents = _batched(noise, 5).to(self.device, torch.float32)
        texts = [self._ready_text(text, len(latents)) for text in (context, negative_context)]
        guidance = self.guide(texts, conditions, latents)
        latents = sample_latents(self, latents, guidance, sampling, with_progress(progress, observer))
        latents = self.finish(latents, guidance)
        return latents if noise.ndim == latents.ndim else latents[0]

    def guide(
        self, texts: Sequence[Tensor | None], condition: Tensor | None, noise: Tensor | None = None
    ) -> Conditions:
        """What `predict` takes in each guidance branch, of its text states (B, L, C) and what stands beside the noise.

        noise: (B, C, T, h, w), where it is there already
        Raises `InputError` for a condition that is not taken, is missing or does not fit.
        """
        if condition is not None:
            raise InputError("conditions are not taken: this checkpoint starts from text alone; leave them out")
        return guidance_of(texts, None, self.transformer.dtype)

    def predict(self, latents: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        """The velocity in float32 of latents (B, C, T, h, w) at timesteps (B,) in one guidance branch."""
        return velocity_of(self.running, latents, timestep, guidance.text)

    def batch_branches(self, conditions: Conditions, latents: Tensor) -> Guidance | None:
        """Both guidance branches as one batch, where a GPU has so much room that this is faster."""
        return both_branches(conditions) if memory.has_room_for_both(self.transformer, latents) else None

    def hold(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Latents, before the first step and after each, with what is given of them put back: here nothing is."""
        return latents

    def finish(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Sampled latents as they are to be decoded: no otherwise than they are."""
        return latents

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) of a video (B, 3, 4 T - 3 frames, height, width) in [-1, 1]; batch optional."""
        with on_device(self.vae, self.device, self.offload) as vae:
            encoded = encode(vae, _batched(video, 5).to(self.device))
        return encoded if video.ndim == 5 else encoded[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Float32 video (B, 3, 4 T - 3 frames, height, width) in [-1, 1] of latents (B, C, T, h, w); batch optional.

        Tiled where memory asks for it, see `wan.models.wan.latents`. Raises `InputError` for one that is not finite.
        """
        with on_device(self.vae, self.device, self.offload) as vae:
            video = decode(vae, _batched(latents, 5).to(self.device))
        check_decoded(video, latents)
        return video if latents.ndim == 5 else video[0]

    @torch.no_grad()
    def glimpse(self, latents: Tensor) -> Tensor:
        """Float32 picture (B, 3, height, width) in [-1, 1] of the first frame of latents (B, C, T, h, w)."""
        with on_device(self.vae, self.device, self.offload) as vae:
            return glimpse(vae, latents.to(self.device))

    def generate(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        size: tuple[int, int] | str | None = None,
        frame_num: int | None = None,
        seed: int | None = None,
        steps: int | None = None,
        shift: float | None = None,
        guide_scale: float | tuple[float, float] | None = None,
        solver: str | None = None,
        progress: bool = False,
        observer: Observer | None = None,
        exact_size: bool | None = None,
        context_scale: float | None = None,
        **inputs: object,
    ) -> np.ndarray | None:
        """A video for a prompt: (frame_num, height, width, 3) uint8; None on a process that does not lead.

        size: (width, height) in pixels, multiples of 16; frame_num: 4n+1 frames
        inputs: what `INPUTS` of `wan.config.inputs` names, of those that the checkpoint takes: pictures as paths,
            PIL images or (height, width, 3) uint8. The video has their form then, in about the area of `size`;
            exact_size: has `size` itself
        context_scale: of what a source video and its like add in each layer, for checkpoints that take one
        What is not given is taken from `self.sampling` and `self.video`. The seed draws the noise on the pipeline's
        device, as the published program does; -1, or none anywhere, draws the seed too. progress: show a line, on the
        first process; observer: is told what happens, see `wan.observe.observer`. Raises `InputError` for settings
        outside what is allowed, and for inputs that are not taken or missing.
        """
        check_prompt(prompt)
        video = changed(self.video, size=size, frame_num=frame_num, exact_size=exact_size)
        sampling = changed(
            self.sampling,
            negative_prompt=negative_prompt,
            seed=seed,
            steps=steps,
            shift=shift,
            guide_scale=guide_scale,
            solver=solver,
            context_scale=context_scale,
        ).with_seed()
        request = request_of(self.kind, prompt, video, sampling, inputs, video.exact_size)
        request.video.check_positions(self.transformer.config.rope_max_seq_len)
        return make_video(self, request, with_progress(progress, observer))

    def draw_noise(self, video: VideoSettings, seed: int, conditions: Conditions | None = None) -> Tensor:
        """Float32 noise (1, C, T, h, w) for a video, which conditions may ask more frames of."""
        return draw_noise(self.transformer, video, seed, self.device)

    @property
    def kind(self) -> Kind:
        """What its checkpoints are, by its transformers."""
        return KINDS["t2v" if self.transformer_2 is None else "t2v-A14B"]

    @property
    def transformers(self) -> tuple[nn.Module, ...]:
        """Those that there are, in the order in which they run."""
        return (self.transformer,) if self.transformer_2 is None else (self.transformer, self.transformer_2)

    @property
    def cache(self) -> StepCache | None:
        """The step cache that the transformer runs with."""
        return step_cache_of(self.transformer)

    @property
    def is_leader(self) -> bool:
        """Whether this process has the results, of those that share a video."""
        return self.distributed is None or self.distributed.is_leader

    def describe_attention(self, video: VideoSettings) -> str:
        """One line: algorithm, backend, grid and blocks for a video of this size, which must be possible."""
        video.check_positions(self.transformer.config.rope_max_seq_len)
        return self.transformer.nabla.describe(video.token_grid, self.device, self.transformer.dtype)

    def _condition_of(self, request: VideoRequest) -> Condition | None:
        """What `condition` makes of a request's inputs, on all processes that share the video; None of text alone."""
        return None

    def _ready_text(self, text: Tensor | None, batch: int) -> Tensor | None:
        if text is None:
            return None
        text = _batched(text, 3).to(self.device, self.transformer.dtype).expand(batch, -1, -1)
        return pad_rows(text, self.text_length)


def _batched(x: Tensor, dims: int) -> Tensor:
    return x if x.ndim == dims else x[None]
