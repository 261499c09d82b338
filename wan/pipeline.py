"""Text to video: the components of a checkpoint and the three stages between a prompt and frames."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nabla import InputError, NablaConfig
from wan import checkpoint as parts
from wan import memory
from wan.attention import apply_attention
from wan.checkpoint import Checkpoint
from wan.config import DEFAULT_NEGATIVE_PROMPT, VAE_STRIDE, check_prompt, check_sampling, check_video
from wan.sampling import denoise, make_solver
from wan.text import clean_prompt, pad_rows, pad_text

log = logging.getLogger("wan")


class WanT2V:
    """Wan2.1 text-to-video. Build with `from_pretrained`.

    transformer: diffusers' `WanTransformer3DModel`; text states may be given unpadded, (B, L, C)
    vae: diffusers' `AutoencoderKLWan`, in float32
    text_encoder: transformers' `UMT5EncoderModel`
    seconds: how long each stage of the last `generate` took
    """

    def __init__(
        self,
        transformer: nn.Module,
        vae: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        device: torch.device,
        text_device: torch.device,
        text_length: int,
        offload: bool,
    ):
        self.transformer = transformer
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.device = device
        self.text_device = text_device
        self.text_length = text_length
        self.offload = offload
        self.seconds: dict[str, float] = {}
        transformer.register_forward_pre_hook(partial(pad_text, length=text_length), with_kwargs=True)
        shape = (1, vae.config.z_dim, 1, 1, 1)
        self.latents_mean = torch.tensor(vae.config.latents_mean).view(shape)
        self.latents_std = torch.tensor(vae.config.latents_std).view(shape)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Checkpoint,
        attention: NablaConfig | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        offload: bool | None = None,
        t5_cpu: bool = False,
    ) -> WanT2V:
        """Load a checkpoint: a directory or hub id, in the published or diffusers' layout.

        attention: None takes the one that the checkpoint names, and dense attention if it names none
        dtype: of the transformer and the text encoder; the VAE is float32
        offload: keep each component in host memory while it is idle; None decides by the size of the GPU
        t5_cpu: run the text encoder on the CPU
        Raises `CheckpointError` for a checkpoint that cannot be had, is incomplete or is damaged.
        """
        checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
        device = torch.device(device)
        if offload is None:
            parts_on_device = [files for part, files in checkpoint.weights.items() if not (t5_cpu and part == "text_encoder")]
            need = sum(files.elements for files in parts_on_device) * dtype.itemsize
            offload = memory.is_crowded(device, need)
        home = torch.device("cpu") if offload else device
        text_device = torch.device("cpu") if t5_cpu else device
        pipe = cls(
            vae=parts.load_vae(checkpoint, torch.float32, home),
            text_encoder=parts.load_text_encoder(checkpoint, dtype, torch.device("cpu") if t5_cpu else home),
            transformer=parts.load_transformer(checkpoint, dtype, home),
            tokenizer=parts.load_tokenizer(checkpoint),
            device=device,
            text_device=text_device,
            text_length=checkpoint.text_length,
            offload=offload,
        )
        if attention is None:
            named = checkpoint.sparse_algorithm
            attention = NablaConfig() if named is None else NablaConfig.parse(named)
        apply_attention(pipe.transformer, attention)
        return pipe

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (B, text length) int64 each, of prompts cleaned as in training."""
        if self.tokenizer is None:
            raise parts.CheckpointError("the checkpoint has no tokenizer, so prompts cannot be read; download it again")
        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self.text_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens.input_ids, tokens.attention_mask

    @torch.no_grad()
    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text states (B, text length, C) of token ids and mask (B, L), zero past each prompt's end."""
        with self._placed(self.text_encoder, self.text_device) as encoder:
            mask = mask.to(self.text_device)
            states = encoder(ids.to(self.text_device), mask).last_hidden_state * mask[..., None]
        states = states.to(self.transformer.dtype)
        return F.pad(states, (0, 0, 0, self.text_length - states.shape[1])).to(self.device)

    @torch.no_grad()
    def sample(
        self,
        context: Tensor,
        negative_context: Tensor | None = None,
        *,
        noise: Tensor,
        steps: int = 50,
        shift: float = 5.0,
        guide_scale: float = 5.0,
        solver: str = "unipc",
        progress: bool = False,
    ) -> Tensor:
        """Denoise float32 noise (B, C, T, h, w) to latents of the same shape, guided by text states (B, L, C).

        `negative_context` is needed unless guide_scale is 1. A single clip may be given, and is returned, unbatched.
        """
        check_sampling(solver, steps, shift, guide_scale)
        if guide_scale != 1 and negative_context is None:
            raise InputError(f"guide_scale {guide_scale} needs negative text states; give them, or set it to 1")
        latents = _batched(noise, 5).to(self.device, torch.float32)
        texts = [self._ready_text(text, len(latents)) for text in (context, negative_context)]
        bar = partial(tqdm, desc="sampling", unit="step") if progress else None
        walk = make_solver(solver, steps, shift, self.device)
        with self._placed(self.transformer, self.device) as transformer:
            batch_guidance = self._has_room_for_both(latents)
            latents = denoise(transformer, latents, *texts, walk, guide_scale, batch_guidance, bar)
        return latents.view(noise.shape)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) of a video (B, 3, 4 T - 3 frames, height, width) in [-1, 1]; batch optional."""
        if video.shape[-3] % VAE_STRIDE[0] != 1:
            raise InputError(f"{video.shape[-3]} frames cannot be encoded; the number of frames must be 4n+1")
        with self._placed(self.vae, self.device) as vae:
            moments = vae.encode(_batched(video, 5).to(self.device, vae.dtype)).latent_dist.mode()
        latents = (moments - self.latents_mean.to(moments)) / self.latents_std.to(moments)
        return latents if video.ndim == 5 else latents[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Video (B, 3, 4 T - 3 frames, height, width) in [-1, 1] of latents (B, C, T, h, w); batch optional.

        Where a GPU has too little memory left the picture is decoded in overlapping tiles, which changes it slightly;
        a line of the log says so.
        """
        with self._placed(self.vae, self.device) as vae:
            batch = _batched(latents, 5).to(self.device, vae.dtype)
            vae.use_tiling = self._needs_tiling(batch)
            batch = batch * self.latents_std.to(batch) + self.latents_mean.to(batch)
            video = vae.decode(batch).sample
        return video if latents.ndim == 5 else video[0]

    def generate(
        self,
        prompt: str,
        negative_prompt: str = DEFAULT_NEGATIVE_PROMPT,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        seed: int = 0,
        steps: int = 50,
        shift: float = 5.0,
        guide_scale: float = 5.0,
        solver: str = "unipc",
        progress: bool = False,
    ) -> np.ndarray:
        """A video for a prompt: (frame_num, height, width, 3) uint8.

        size: (width, height) in pixels, multiples of 16; frame_num: 4n+1 frames
        The seed draws the noise on the pipeline's device, as the published program does.
        Raises `InputError` for settings outside what is allowed.
        """
        check_prompt(prompt)
        check_video(size, frame_num)
        check_sampling(solver, steps, shift, guide_scale)
        self.seconds = {}
        with self._stage("text"):
            context, negative_context = self.encode_text(*self.tokenize([prompt, negative_prompt])).split(1)
        with self._stage("sampling"):
            noise = self.draw_noise(size, frame_num, seed)
            latents = self.sample(
                context,
                negative_context,
                noise=noise,
                steps=steps,
                shift=shift,
                guide_scale=guide_scale,
                solver=solver,
                progress=progress,
            )
        with self._stage("decode"):
            return to_frames(self.decode(latents)[0])

    def draw_noise(self, size: tuple[int, int], frame_num: int, seed: int) -> Tensor:
        """Float32 noise (1, C, T, h, w) for a video of `size` (width, height) and `frame_num` frames."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(self._latents_shape(size, frame_num), generator=generator, device=self.device)[None]

    def describe_attention(self, size: tuple[int, int], frame_num: int) -> str:
        """One line: algorithm, backend, grid and blocks for a video of this size."""
        return self.transformer.nabla.plan(self._latents_shape(size, frame_num)[1:], self.device).describe()

    def _latents_shape(self, size: tuple[int, int], frame_num: int) -> tuple[int, int, int, int]:
        (width, height), (t, h, w) = size, VAE_STRIDE
        return self.vae.config.z_dim, (frame_num - 1) // t + 1, height // h, width // w

    def _ready_text(self, text: Tensor | None, batch: int) -> Tensor | None:
        if text is None:
            return None
        text = _batched(text, 3).to(self.device, self.transformer.dtype).expand(batch, -1, -1)
        return pad_rows(text, self.text_length)

    @contextmanager
    def _placed(self, module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
        """A component on the device it runs on, and back in host memory afterwards if components are offloaded."""
        if not self.offload:
            yield module
            return
        try:
            yield module.to(device)
        finally:
            module.to("cpu")

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = time.perf_counter() - start

    def _has_room_for_both(self, latents: Tensor) -> bool:
        """Whether both guidance branches are so small beside the GPU that one batch of two fills it better."""
        if self.device.type != "cuda":
            return False
        config = self.transformer.config
        tokens = 2 * latents[:, 0].numel() // math.prod(config.patch_size)
        dim = config.num_attention_heads * config.attention_head_dim
        need = memory.forward_bytes(tokens, dim, config.ffn_dim, self.transformer.dtype.itemsize)
        return need < memory.free_bytes(self.device) // 8

    def _needs_tiling(self, latents: Tensor) -> bool:
        if self.device.type != "cuda":
            return False
        height, width = latents.shape[3] * VAE_STRIDE[1], latents.shape[4] * VAE_STRIDE[2]
        need, free = memory.decode_bytes(height, width, latents.element_size()), memory.free_bytes(self.device)
        if need > free:
            log.info("decoding in tiles: at once needs %.1f GiB, %.1f are free", need / memory.GIB, free / memory.GIB)
        return need > free


def to_frames(video: Tensor) -> np.ndarray:
    """(3, frames, height, width) in [-1, 1] -> (frames, height, width, 3) uint8."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def _batched(x: Tensor, dims: int) -> Tensor:
    return x if x.ndim == dims else x[None]
