"""Text to video: the components of a checkpoint and the three stages between a prompt and frames."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nabla import InputError, NablaConfig
from wan import memory
from wan.attention import apply_attention, compile_blocks, many_compiles
from wan.cache_settings import CacheSettings
from wan.checkpoint import Checkpoint
from wan.config import LoraFile, SamplingSettings, VideoSettings, check_positions, check_prompt
from wan.latents import decode, encode
from wan.loading import load_models
from wan.observer import Observer, Observers
from wan.parallel import apply_sequence, gather_guidance
from wan.planner import Plan
from wan.processes import Layout, Processes
from wan.recorder import Recorder
from wan.sampling import denoise, make_solver
from wan.step_cache import StepCache, apply_cache
from wan.text import pad_rows, pad_text, tokenize
from wan.video import to_frames
from wan.weights import CheckpointError

log = logging.getLogger("wan")


class WanT2V:
    """Wan2.1 text-to-video. Build with `from_pretrained`.

    transformer: diffusers' `WanTransformer3DModel`; text states may be given unpadded, (B, L, C)
    vae: diffusers' `AutoencoderKLWan`, its encoder in float32
    text_encoder: transformers' `UMT5EncoderModel`
    sampling, video: the settings that `generate` uses where it is given none
    processes: those that share the work, or None for this one alone. Of those that share a video one leads: only it
        has a VAE, a text encoder unless that is sharded, and the result
    seconds: how long each stage of the last `generate` took
    plan: of memory, by which the models were loaded, or None
    """

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
        processes: Processes | None = None,
    ):
        self.transformer = transformer
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.device = device
        self.text_device = text_device
        self.text_length = text_length
        self.offload = offload
        self.sampling = sampling
        self.video = video
        self.processes = processes
        self.seconds: dict[str, float] = {}
        self.plan: Plan | None = None
        transformer.register_forward_pre_hook(partial(pad_text, length=text_length), with_kwargs=True)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Checkpoint,
        attention: NablaConfig | str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        offload: bool | None = None,
        t5_cpu: bool = False,
        compile: bool | None = None,
        fp8: bool = False,
        vae_dtype: torch.dtype | None = None,
        processes: Processes | None = None,
        dit_fsdp: bool = False,
        t5_fsdp: bool = False,
        transformer: str | Path | None = None,
        lora: Sequence[str | LoraFile] = (),
        cache: CacheSettings | str | None = None,
        plan: Plan | None = None,
    ) -> WanT2V:
        """Load a checkpoint: a directory or hub id, in the published or diffusers' layout.

        attention: a config or its string; None takes the one that the checkpoint names, and dense if it names none
        dtype: of the transformer and the text encoder; the VAE's encoder is float32
        offload: keep each component in host memory while it is idle; None decides by the size of the GPU
        t5_cpu: run the text encoder on the CPU
        compile: compile the transformer's blocks; None does so on a GPU. Every new size of video compiles anew
        fp8: run the transformer's linear layers in float8, see `wan.fp8`
        vae_dtype: of the VAE's decoder; None means float16 on a GPU beside a half-precision transformer, else float32
        processes: share the work as they are laid out
        dit_fsdp, t5_fsdp: shard the transformer, the text encoder over the processes that share a video
        transformer: a file of weights in place of the checkpoint's transformer, see `wan.single_file`
        lora: files, or `file:scale`, merged into the transformer's weights, see `wan.lora`
        cache: reuse what blocks computed in earlier steps, as `kind:threshold` says, see `wan.cache_settings`
        plan: where the models lie and how their weights are packed, in place of offload, t5_cpu and fp8; see
            `wan.budget.plan_run`
        Raises `CheckpointError` for a checkpoint that cannot be had, is incomplete or is damaged.
        """
        checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path, transformer is None)
        device = torch.device(device)
        if isinstance(attention, str):
            attention = NablaConfig.parse(attention)
        asked = {} if attention is None else {"attention": {"algorithm": "dense"}}
        defaults = checkpoint.resolve(asked, {"prompt": "none"})
        if attention is None:
            attention = defaults.attention
            log.info("attention of the checkpoint: %s", attention.algorithm)
        models = load_models(
            checkpoint,
            device,
            dtype,
            vae_dtype,
            fp8=fp8,
            offload=offload,
            t5_cpu=t5_cpu,
            processes=processes,
            dit_fsdp=dit_fsdp,
            t5_fsdp=t5_fsdp,
            transformer_file=transformer,
            lora=[LoraFile.parse(file) for file in lora],
            plan=plan,
        )
        t5_cpu = t5_cpu if plan is None else plan.text == "cpu"
        pipe = cls(
            **models._asdict(),
            device=device,
            text_device=torch.device("cpu") if t5_cpu else device,
            text_length=checkpoint.text_length,
            sampling=defaults.sampling,
            video=defaults.video,
            processes=processes,
        )
        pipe.plan = plan
        if device.type == "cuda" if compile is None else compile:
            compile_blocks(pipe.transformer)
        if (cache := CacheSettings.parse(cache)) is not None:
            apply_cache(pipe.transformer, cache)
        if processes is not None and processes.layout.ulysses > 1:
            apply_sequence(pipe.transformer, processes.sequence)
        apply_attention(pipe.transformer, attention)
        return pipe

    def tokenize(self, prompts: str | list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (B, text length) int64 each, of prompts cleaned as in training; too long ones are cut."""
        if self.tokenizer is None:
            raise CheckpointError("the checkpoint has no tokenizer, so prompts cannot be read; download it again")
        return tokenize(self.tokenizer, [prompts] if isinstance(prompts, str) else prompts, self.text_length)

    @torch.no_grad()
    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text states (B, text length, C) of token ids and mask (B, L), zero past each prompt's end."""
        with memory.placed(self.text_encoder, self.text_device, self.offload) as encoder:
            mask = mask.to(self.text_device)
            states = encoder(ids.to(self.text_device), mask).last_hidden_state * mask[..., None]
        return pad_rows(states.to(self.device, self.transformer.dtype), self.text_length)

    @torch.no_grad()
    def sample(
        self,
        context: Tensor,
        negative_context: Tensor | None = None,
        *,
        noise: Tensor,
        steps: int | None = None,
        shift: float | None = None,
        guide_scale: float | None = None,
        solver: str | None = None,
        progress: bool = False,
        observer: Observer | None = None,
    ) -> Tensor:
        """Denoise float32 noise (B, C, T, h, w) to latents of the same shape, guided by text states (B, L, C).

        `negative_context` is needed unless guide_scale is 1. A single clip may be given, and is returned, unbatched.
        What is not given is taken from `self.sampling`: 50 steps of unipc, shift 5, guide_scale 5 unless the
        checkpoint says else. Processes that share a video must be given the same. progress: show a line, on the first
        process; observer: is told what happens, see `wan.observer`. Raises `InputError` for settings
        outside what is allowed, and for latents not finite.
        """
        sampling = _changed(self.sampling, steps=steps, shift=shift, guide_scale=guide_scale, solver=solver)
        if sampling.guide_scale != 1 and negative_context is None:
            raise InputError(
                f"guide_scale {sampling.guide_scale} needs negative text states; give them, or set it to 1"
            )
        latents = _batched(noise, 5).to(self.device, torch.float32)
        texts = [self._ready_text(text, len(latents)) for text in (context, negative_context)]
        applied = getattr(self.transformer, "nabla", None)
        counter = applied.steps if applied else None
        cache = self.cache
        observer = _observer(progress, observer)

        def at_step(step: int) -> None:
            if counter:
                counter.tell(step)
            observer.step_begins(step)

        # As one batch each guidance branch would keep blocks of its own.
        shares = applied is not None and applied.config.mask_refresh > 1
        layout, gather = self.processes.layout if self.processes else Layout(), None
        if layout.cfg > 1 and sampling.guide_scale != 1:
            if shares:
                raise InputError("guidance branches that share masks (mask_refresh) cannot run apart; set cfg_size 1")
            branches = self.processes.branches
            texts, gather = [texts[branches.get_local_rank()], None], partial(gather_guidance, mesh=branches)
        takes_batch = layout.sharing == 1 and not shares and cache is None
        try:
            if cache is not None:
                cache.begin(sampling.steps, applied.config.dense_steps if applied else 0)
            with (
                memory.placed(self.transformer, self.device, self.offload) as transformer,
                many_compiles(),
                observer.sampling(self, sampling, latents),
            ):
                latents = denoise(
                    transformer,
                    latents,
                    *texts,
                    make_solver(sampling.solver, sampling.steps, sampling.shift, self.device),
                    sampling.guide_scale,
                    batch_guidance=takes_batch and memory.has_room_for_both(transformer, latents),
                    at_step=at_step,
                    after_step=observer.step_ends,
                    gather=gather,
                    **({} if cache is None else {"in_branch": cache.branch}),
                )
        finally:
            if cache is not None:
                cache.end()
            if applied:
                counter.tell(None)
                applied.forget_blocks()
        if not latents.isfinite().all():
            raise InputError("sampling ended in values that are not finite; in float16, try bfloat16")
        return latents.view(noise.shape)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) of a video (B, 3, 4 T - 3 frames, height, width) in [-1, 1]; batch optional."""
        with memory.placed(self.vae, self.device, self.offload) as vae:
            encoded = encode(vae, _batched(video, 5).to(self.device))
        return encoded if video.ndim == 5 else encoded[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Float32 video (B, 3, 4 T - 3 frames, height, width) in [-1, 1] of latents (B, C, T, h, w); batch optional.

        Tiled where memory asks for it, see `wan.latents.decode`.
        """
        with memory.placed(self.vae, self.device, self.offload) as vae:
            video = decode(vae, _batched(latents, 5).to(self.device))
        return video if latents.ndim == 5 else video[0]

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
    ) -> np.ndarray | None:
        """A video for a prompt: (frame_num, height, width, 3) uint8; None on a process that does not lead.

        size: (width, height) in pixels, multiples of 16; frame_num: 4n+1 frames
        What is not given is taken from `self.sampling` and `self.video`. The seed draws the noise on the pipeline's
        device, as the published program does; -1, or none anywhere, draws the seed too. progress: show a line, on the
        first process; observer: is told what happens, see `wan.observer`. Raises `InputError` for settings outside what
        is allowed.
        """
        check_prompt(prompt)
        video = _changed(self.video, size=size, frame_num=frame_num)
        sampling = _changed(
            self.sampling,
            negative_prompt=negative_prompt,
            seed=seed,
            steps=steps,
            shift=shift,
            guide_scale=guide_scale,
            solver=solver,
        ).with_seed()
        check_positions(video, self.transformer.config.rope_max_seq_len)
        self.seconds, observer = {}, _observer(progress, observer)
        with observer.video(self, prompt, video, sampling):
            with self._stage("text", observer):
                prompts = [prompt] if sampling.guide_scale == 1 else [prompt, sampling.negative_prompt]
                contexts = self._text_for_all(prompts).split(1)
            with self._stage("sampling", observer):
                latents = self.sample(
                    *contexts,
                    noise=self._from_leader(self.draw_noise(video, sampling.seed)),
                    steps=sampling.steps,
                    shift=sampling.shift,
                    guide_scale=sampling.guide_scale,
                    solver=sampling.solver,
                    observer=observer,
                )
            if not self.leads:
                return None
            with self._stage("decode", observer):
                return to_frames(self.decode(latents)[0])

    def draw_noise(self, video: VideoSettings, seed: int) -> Tensor:
        """Float32 noise (1, C, T, h, w) for a video."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = self.transformer.config.in_channels, *video.latents_size
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)[None]

    @property
    def cache(self) -> StepCache | None:
        """What `wan.step_cache.apply_cache` left on the transformer."""
        return getattr(self.transformer, "step_cache", None)

    @property
    def leads(self) -> bool:
        """Whether this process has the results, of those that share a video."""
        return self.processes is None or self.processes.leads

    def describe_attention(self, video: VideoSettings) -> str:
        """One line: algorithm, backend, grid and blocks for a video of this size, which must be possible."""
        check_positions(video, self.transformer.config.rope_max_seq_len)
        return self.transformer.nabla.plan(video.latents_size, self.device, self.transformer.dtype).describe()

    @contextmanager
    def _stage(self, name: str, observer: Observer) -> Iterator[None]:
        observer.stage_begins(name)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = time.perf_counter() - start
        observer.stage_ends(name, self.seconds[name])

    def _text_for_all(self, prompts: list[str]) -> Tensor:
        """Text states of prompts, on all processes that share a video."""
        if self.text_encoder is not None:
            return self._from_leader(self.encode_text(*self.tokenize(prompts)))
        shape = len(prompts), self.text_length, self.transformer.config.text_dim
        return self._from_leader(torch.empty(shape, device=self.device, dtype=self.transformer.dtype))

    def _from_leader(self, x: Tensor) -> Tensor:
        return x if self.processes is None else self.processes.from_leader(x.contiguous())

    def _ready_text(self, text: Tensor | None, batch: int) -> Tensor | None:
        if text is None:
            return None
        text = _batched(text, 3).to(self.device, self.transformer.dtype).expand(batch, -1, -1)
        return pad_rows(text, self.text_length)


def _observer(progress: bool, observer: Observer | None) -> Observer:
    if not progress:
        return observer or Observer()
    shown = Recorder(progress=True, timed=False)
    return shown if observer is None else Observers(shown, observer)


def _changed(settings: Any, **values: Any) -> Any:
    return replace(settings, **{key: value for key, value in values.items() if value is not None})


def _batched(x: Tensor, dims: int) -> Tensor:
    return x if x.ndim == dims else x[None]
