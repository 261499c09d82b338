"""What Kandinsky-5's clips are prepared with: the VAE's encoder and both text encoders, as training asks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from wan.checkpoints.fingerprints import fingerprint_models
from wan.models.checkpoint import Checkpoint
from wan.models.kandinsky import components
from wan.models.kandinsky.geometry import GEOMETRY
from wan.models.kandinsky.layout import TOKENIZERS
from wan.models.kandinsky.text import (
    CLIP_DTYPE,
    cut_note,
    pooled_states,
    text_states,
    tokenize,
    tokenize_pooled,
    tokens_before,
)
from wan.models.kandinsky.vae import STRIDE, WINDOW, prepare_decoder


class KandinskyClipEncoder:
    """The VAE, its encoder in `vae_dtype`, both text encoders and their tokenizers, a `ClipEncoder`.

    whole_clips: encode clips in one pass rather than by windows of 17 frames that fade over, which needs memory for all
        frames and gives slightly other latents
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, vae_dtype: torch.dtype, whole_clips: bool):
        self.device, self.length = device, checkpoint.text_length
        self.vae = components.vae_component(checkpoint).load(torch.float32, device)
        # Latents are scaled by it and differ by how clips are cut, so clips of another are others. Before the type of
        # the encoder is changed.
        reading = repr((self.vae.config.scaling_factor, whole_clips)).encode()
        self.fingerprints = {"vae": fingerprint_models(reading, self.vae.encoder, self.vae.quant_conv)}
        prepare_decoder(self.vae, torch.float32)
        self.vae.encoder.to(vae_dtype)
        self.vae.quant_conv.to(vae_dtype)
        # As the decoder's windows are, in frames of video.
        self.vae.use_framewise_encoding = not whole_clips
        self.vae.tile_sample_min_num_frames = GEOMETRY.frames_of(WINDOW) - 1
        self.vae.tile_sample_stride_num_frames = GEOMETRY.vae_stride[0] * STRIDE
        # CPUs may have no instructions for bfloat16, in which it takes a hundred times as long.
        text_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        found = components.text_encoder_component(checkpoint), components.text_encoder_2_component(checkpoint)
        dtypes = text_dtype, CLIP_DTYPE
        self.text_encoder, self.text_encoder_2 = (one.load(dtype, device) for one, dtype in zip(found, dtypes))
        for encoder in (self.text_encoder, self.text_encoder_2):
            components.finish_text_encoder(encoder, device)
        self.tokenizer, self.tokenizer_2 = (
            components.load_tokenizer(checkpoint, name, encoder.config.vocab_size)
            for name, encoder in zip(TOKENIZERS, (self.text_encoder, self.text_encoder_2))
        )
        # What else decides which tokens the encoders see.
        files = b"".join(file.read_bytes() for name in TOKENIZERS for file in checkpoint.tokenizer_files(name))
        reading = files + str(self.length).encode()
        self.fingerprints["text_encoder"] = fingerprint_models(reading, self.text_encoder, self.text_encoder_2)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Float32 latents (B, C, T, h, w) of a video (B, 3, 4 T - 3 frames, height, width) in [-1, 1].

        Raises `InputError` for frames or sizes that the VAE would drop or crop.
        """
        frames, height, width = video.shape[2:]
        GEOMETRY.check_whole((width, height), frames)
        # An earlier decoding may have switched tiles on.
        self.vae.use_tiling = False
        distribution = self.vae.encode(video.to(self.vae.encoder.conv_in.conv.weight.dtype)).latent_dist
        # The mean, so that a clip has the same latents whenever it is prepared.
        return distribution.mode().float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def states(self, captions: list[str]) -> list[dict[str, Tensor]]:
        """Of each caption, on the CPU, "text": the language model's states (L, C), and "pooled": CLIP's (P,)."""
        ids, mask = (x.to(self.device) for x in tokenize(self.tokenizer, captions, self.length))
        texts = text_states(self.text_encoder, ids, mask, tokens_before(self.tokenizer))
        most = self.text_encoder_2.config.max_position_embeddings
        pooled = pooled_states(
            self.text_encoder_2, *(x.to(self.device) for x in tokenize_pooled(self.tokenizer_2, captions, most))
        )
        return [{"text": text.cpu(), "pooled": own.to("cpu", text.dtype)} for text, own in zip(texts, pooled)]

    def beside(self, videos: Tensor) -> list[dict[str, Tensor]]:
        """Of each video what is stored beside its latents: nothing."""
        return [{} for _ in videos]

    def cut_notes(self, captions: list[str]) -> list[str]:
        """A line for each caption that is longer than the language model takes."""
        return [note for one in captions if (note := cut_note(self.tokenizer, one, self.length)) is not None]
