"""Text, and a picture, to video: the three stages between a prompt and frames."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from wan.caches.applied import step_cache_of
from wan.config.model_settings import LoraFile
from wan.config.prompts import check_prompt
from wan.config.settings import SamplingSettings, VideoSettings, changed
from wan.files.picture import picture_of
from wan.memory.placement import on_device
from wan.memory.planner import MemoryPlan
from wan.models import pretrained
from wan.models.checkpoint import Checkpoint
from wan.models.kandinsky.components import transformer_component
from wan.models.kandinsky.expand import Expander, expand
from wan.models.kandinsky.geometry import GEOMETRY, rope_scale
from wan.models.kandinsky.guidance import Guidance, encode_request, given_conditions
from wan.models.kandinsky.latents import begin_with, channels_first, decode, draw_noise, encode_picture, glimpse
from wan.models.kandinsky.loading import load_models
from wan.models.kandinsky.memory import has_room_for_both
from wan.models.kandinsky.picture import picture_pixels, start_from
from wan.models.kandinsky.processor import TRANSFORMER, install_processors, velocity_of
from wan.models.kandinsky.text import cut_note, pooled_states, text_states, tokenize, tokenize_pooled, tokens_before
from wan.observe.observer import Observer
from wan.observe.recorder import with_progress
from wan.parallel.distributed import DistributedContext
from wan.sampling.finite import check_decoded
from wan.sampling.guided import make_video, sample_latents
from wan.sampling.loop import Conditions
from wan.sampling.request import VideoRequest
from wan.sampling.texts import CutNotes

if TYPE_CHECKING:
    from wan.caches.base import StepCache


class Kandinsky5:
    """Kandinsky-5, text and picture to video. Build with `from_pretrained`, see `wan.models.pretrained`.

    transformer: diffusers' `Kandinsky5Transformer3DModel`
    vae: diffusers' `AutoencoderKLHunyuanVideo`, its encoder in float32
    text_encoder, text_encoder_2: transformers' `Qwen2_5_VLTextModel` and `CLIPTextModel`
    expander: what writes prompts around the same language model, see `expand_prompt`; None where none are written
    text_length: rows of text that the transformer sees; shorter texts are padded, and the padding is masked
    sampling, video: the settings that `generate` uses where it is given none
    processes: those that share the work, kept as `distributed`, or None for this one alone. Of those that share a
        video one leads: only it has a VAE, text encoders unless those are sharded, and the result
    seconds: how long each stage of the last `generate` took
    plan: of memory, by which the models were loaded, or None
    lora: what was merged into the transformer
    """

    transformer_spec = TRANSFORMER
    load_models = staticmethod(load_models)
    transformer_component = staticmethod(transformer_component)
    from_settings = classmethod(pretrained.from_settings)

    def __init__(
        self,
        transformer: nn.Module,
        vae: nn.Module | None,
        text_encoder: nn.Module | None,
        text_encoder_2: nn.Module | None,
        tokenizer: Any,
        tokenizer_2: Any,
        device: torch.device,
        text_device: torch.device,
        text_length: int,
        offload: bool,
        sampling: SamplingSettings,
        video: VideoSettings,
        processes: DistributedContext | None = None,
        expander: Expander | None = None,
    ):
        self.transformer = self.running = transformer
        # One transformer runs in all steps.
        self.boundary = None
        self.vae = vae
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.tokenizer = tokenizer
        self.tokenizer_2 = tokenizer_2
        self.expander = expander
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
        # Of the rotary table, along the axis that has fewest.
        self._positions = min(transformer.visual_rope_embeddings.max_pos)
        self.text_mask = install_processors(transformer)

    @classmethod
    def from_pretrained(cls, path: str | Path | Checkpoint, *args: Any, **options: Any) -> Kandinsky5:
        """`wan.from_pretrained` of a checkpoint that has to be of this family."""
        return pretrained.from_pretrained(path, *args, **options, pipeline=cls)

    def tokenize(self, prompts: str | list[str], still: bool = False) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (B, L) int64 each, for the language model: each prompt in the published template.

        Too long ones are cut, which the log says once of each. still: in that of pictures, for videos of one frame
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        # Of those that share a video all tokenize where its text encoder is sharded, and one says so.
        if self.is_leader:
            self.cuts.warn(prompts)
        return tokenize(self.tokenizer, prompts, self.text_length, still)

    def tokenize_pooled(self, prompts: str | list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (B, 77) int64 each, for CLIP, which sees the beginning of a long prompt."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return tokenize_pooled(self.tokenizer_2, prompts, self.text_encoder_2.config.max_position_embeddings)

    def prompt_notes(self, *prompts: str) -> tuple[str, ...]:
        """A line for each prompt that is longer than the language model takes."""
        return self.cuts.of(*prompts)

    def expand_prompt(self, prompt: str, image: object = None) -> str:
        """A prompt written out by the language model, on all processes that share a video; always the same.

        image: the picture that the video begins with, as of `generate`
        Raises `InputError` for a pipeline that was not loaded with `expand_prompt=True`.
        """
        check_prompt(prompt)
        return expand(self, prompt, None if image is None else picture_of(image))

    @torch.no_grad()
    def encode_text(self, ids: Tensor, mask: Tensor, still: bool = False) -> list[Tensor]:
        """Text states (own rows, C) of each prompt, of ids and mask (B, L) as `tokenize` gave for the same `still`."""
        with on_device(self.text_encoder, self.text_device, self.offload) as encoder:
            ids, mask = ids.to(self.text_device), mask.to(self.text_device)
            states = text_states(encoder, ids, mask, tokens_before(self.tokenizer, still))
        return [text.to(self.device, self.transformer.dtype) for text in states]

    @torch.no_grad()
    def encode_pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """CLIP's state (B, P) of token ids and mask (B, L)."""
        with on_device(self.text_encoder_2, self.text_device, self.offload) as encoder:
            pooled = pooled_states(encoder, ids.to(self.text_device), mask.to(self.text_device))
        return pooled.to(self.device, self.transformer.dtype)

    @torch.no_grad()
    def encode_picture(self, picture: np.ndarray, size: tuple[int, int], seed: int | None = None) -> Tensor:
        """Float32 latents (1, C, 1, h, w) of a picture (height, width, 3) uint8, for videos of (width, height) pixels.

        seed: draws them from what the encoder gives, as the published program does; None for its mean
        """
        with on_device(self.vae, self.device, self.offload) as vae:
            return encode_picture(vae, picture_pixels(picture, size).to(self.device), seed)

    def encode(self, request: VideoRequest) -> Conditions:
        """What guides a video, on all processes that share it: `Guidance` of each branch."""
        return encode_request(self, request)

    @torch.no_grad()
    def sample(
        self,
        text: Tensor,
        pooled: Tensor,
        negative_text: Tensor | None = None,
        negative_pooled: Tensor | None = None,
        *,
        noise: Tensor,
        steps: int | None = None,
        shift: float | None = None,
        guide_scale: float | None = None,
        solver: str | None = None,
        image_latents: Tensor | None = None,
        progress: bool = False,
        observer: Observer | None = None,
    ) -> Tensor:
        """Denoise float32 noise (T, h, w, C) to latents of the same shape, guided by text states (L, C) and (1, P).

        The negative ones are needed unless guide_scale is 1. image_latents: (1, h, w, C) of a picture that is the first
        frame; `finish` is not applied. All may come as batches, with a first axis more. What is not given is taken
        from `self.sampling`. Processes that share a video must be given the same. progress, observer: as of `generate`.
        Raises `InputError` for settings outside what is allowed, and for latents not finite.
        """
        sampling = changed(self.sampling, steps=steps, shift=shift, guide_scale=guide_scale, solver=solver)
        latents = channels_first(noise).to(self.device, torch.float32)
        first_frame = None if image_latents is None else channels_first(image_latents).to(latents)
        given = (text, pooled), (negative_text, negative_pooled)
        conditions = given_conditions(self, *given, first_frame, sampling.guide_scale_of(0))
        latents = sample_latents(self, latents, conditions, sampling, with_progress(progress, observer))
        return latents.movedim(1, -1).reshape(noise.shape)

    def predict(self, latents: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        """The velocity in float32 of latents (B, C, T, h, w) at timesteps (B,) in one guidance branch."""
        text, rows, pooled, first_frame = guidance.expand(len(latents))
        scale = rope_scale(GEOMETRY.size_of(latents.shape[2:]))
        with self.text_mask.of(rows):
            return velocity_of(self.running, latents, timestep, text, pooled, scale, first_frame)

    def batch_branches(self, conditions: Conditions, latents: Tensor) -> Guidance | None:
        """Both guidance branches as one batch, where a GPU has so much room that this is faster."""
        if not has_room_for_both(self.transformer, latents):
            return None
        prompt, negative = (branch.expand(len(latents)) for branch in conditions[:2])
        return prompt.beside(negative)

    def hold(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Latents as they are: nothing of them is put back while they are sampled."""
        return latents

    def finish(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Sampled latents (B, C, T, h, w), those of a picture with it in front and the frames after in its colours."""
        first_frame = conditions.prompt.first_frame
        return latents if first_frame is None else begin_with(latents, first_frame)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Float32 video (B, 3, 4 T - 3 frames, height, width) of latents (B, C, T, h, w), in about [-1, 1]; of one
        clip (T, h, w, C), as `sample` gives it, (3, 4 T - 3 frames, height, width).

        Tiled where memory asks for it, see `wan.models.kandinsky.latents`. Raises `InputError` if it is not finite.
        """
        batch = latents if latents.ndim == 5 else channels_first(latents)
        with on_device(self.vae, self.device, self.offload) as vae:
            video = decode(vae, batch.to(self.device))
        check_decoded(video, latents)
        return video if latents.ndim == 5 else video[0]

    @torch.no_grad()
    def glimpse(self, latents: Tensor) -> Tensor:
        """The first frame (B, 3, height, width) of what `decode` makes of latents (B, C, T, h, w)."""
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
        guide_scale: float | None = None,
        solver: str | None = None,
        progress: bool = False,
        observer: Observer | None = None,
        image: object = None,
        expand_prompt: bool = False,
        exact_size: bool | None = None,
    ) -> np.ndarray | None:
        """A video for a prompt: (frame_num, height, width, 3) uint8; None on a process that does not lead.

        size: (width, height) in pixels, multiples of 16; frame_num: 4n+1 frames
        image: the picture that it begins with: a path, a PIL image, or (height, width, 3) uint8; the video then has its
            form, in about the size asked for, unless exact_size says that it is to have that very size
        expand_prompt: make it of what `expand_prompt` writes
        What is not given is taken from `self.sampling` and `self.video`. The seed draws the noise on the pipeline's
        device, as the published program does; -1, or none anywhere, draws the seed too. progress: show a line, on the
        first process; observer: is told what happens, see `wan.observe.observer`. Raises `InputError` for settings
        outside what is allowed.
        """
        check_prompt(prompt)
        video = changed(self.video, size=size, frame_num=frame_num, exact_size=exact_size)
        picture, video = start_from(image, video, self.transformer)
        sampling = changed(
            self.sampling,
            negative_prompt=negative_prompt,
            seed=seed,
            steps=steps,
            shift=shift,
            guide_scale=guide_scale,
            solver=solver,
        ).with_seed()
        video.check_positions(self._positions)
        if expand_prompt:
            prompt = self.expand_prompt(prompt, picture)
        return make_video(self, VideoRequest(prompt, video, sampling, picture), with_progress(progress, observer))

    def draw_noise(self, video: VideoSettings, seed: int, conditions: Conditions | None = None) -> Tensor:
        """Float32 noise (1, C, T, h, w) for a video, drawn with channels last, as the published program does."""
        return draw_noise(self.transformer, video, seed, self.device)

    @property
    def transformers(self) -> tuple[nn.Module, ...]:
        """The one that there is."""
        return (self.transformer,)

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
        video.check_positions(self._positions)
        return self.transformer.nabla.describe(video.token_grid, self.device, self.transformer.dtype)
