"""Layers of HunyuanVideo's VAE in fewer passes over its features, which lie channels last as cuDNN computes with them.

Its time goes to passes over 17 full-size pictures of 128 channels more than to convolutions: a GPU's group norm gives
each group to one block of threads, and diffusers' layers normalise, activate, pad and convert layouts one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoCausalConv3d,
    HunyuanVideoDecoder3D,
    HunyuanVideoEncoder3D,
    HunyuanVideoMidBlock3D,
    HunyuanVideoResnetBlockCausal3D,
    HunyuanVideoUpsampleCausal3D,
)
from torch import Tensor, nn

# From how many numbers on a convolution on a CPU is oneDNN's. Torch goes by batch, channels, frames and rows alone, and
# leaves the middle layers of a window to kernels that take longer.
ONEDNN_LEAST = 2**18 if torch.backends.mkldnn.is_available() else float("inf")
# Kernels of torch that count numbers in 32 bits take fewer.
MOST_NUMBERS = 2**31


def speed_up(vae: AutoencoderKLHunyuanVideo) -> None:
    """Give a VAE's layers forwards of fewer passes, in place, for use without gradients.

    In float32 the results are the same up to rounding. Attention goes frame by frame: diffusers makes a mask of all
    pairs of places, 24 GiB of it at 1280x768.
    """
    forwards = {
        HunyuanVideoEncoder3D: _encoder,
        HunyuanVideoDecoder3D: _decoder,
        HunyuanVideoMidBlock3D: _mid_block,
        HunyuanVideoResnetBlockCausal3D: _resnet,
        HunyuanVideoUpsampleCausal3D: _upsample,
        HunyuanVideoCausalConv3d: _causal_conv,
    }
    for part in (vae.encoder, vae.decoder):
        for module in part.modules():
            if type(module) in forwards:
                module.forward = functools.partial(forwards[type(module)], module)
        for weight in part.parameters():
            if weight.ndim == 5:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)


def _encoder(encoder: HunyuanVideoEncoder3D, x: Tensor) -> Tensor:
    layers = [layer for block in encoder.down_blocks for layer in (*block.resnets, *(block.downsamplers or ()))]
    return _through(encoder, [*layers, encoder.mid_block], x)


def _decoder(decoder: HunyuanVideoDecoder3D, x: Tensor) -> Tensor:
    layers = [layer for block in decoder.up_blocks for layer in (*block.resnets, *(block.upsamplers or ()))]
    return _through(decoder, [decoder.mid_block, *layers], x)


def _through(part: HunyuanVideoEncoder3D | HunyuanVideoDecoder3D, layers: list[nn.Module], x: Tensor) -> Tensor:
    # Layer by layer: a call of a whole block would keep what went into it until it is through.
    for layer in (part.conv_in, *layers):
        x = layer(x)
    return _norm_silu_conv(part.conv_norm_out, part.conv_out, x)


def _mid_block(block: HunyuanVideoMidBlock3D, x: Tensor) -> Tensor:
    """The middle of the encoder or the decoder, (B, C, T, h, w), whose places see those of their frame and before."""
    x = block.resnets[0](x)
    for attention, resnet in zip(block.attentions, block.resnets[1:]):
        x = x if attention is None else _attend(attention, x)
        x = resnet(x)
    return x


def _attend(attention: Attention, x: Tensor) -> Tensor:
    frames, places = x.shape[2], x.shape[3] * x.shape[4]
    normed = torch.empty_like(x, memory_format=torch.channels_last_3d)
    _normalise(attention.group_norm, x, normed)
    normed = normed.flatten(2).transpose(1, 2)
    # (B, 1 head, places of all frames, C)
    q, k, v = (layer(normed)[:, None] for layer in (attention.to_q, attention.to_k, attention.to_v))
    out = [
        F.scaled_dot_product_attention(q[:, :, end - places : end], k[:, :, :end], v[:, :, :end])
        for end in range(places, frames * places + 1, places)
    ]
    # The second layer of `to_out` is a dropout of nothing.
    return x + attention.to_out[0](torch.cat(out, dim=2)[:, 0]).transpose(1, 2).view_as(x)


def _resnet(block: HunyuanVideoResnetBlockCausal3D, x: Tensor) -> Tensor:
    # Its dropout is of nothing.
    change = _norm_silu_conv(block.norm1, block.conv1, x)
    change = _norm_silu_conv(block.norm2, block.conv2, change)
    return change.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))


def _upsample(layer: HunyuanVideoUpsampleCausal3D, x: Tensor) -> Tensor:
    """Nearest neighbours, and the convolution. The first frame stays one, since it stands for one frame of video."""
    (batch, channels, frames, rows, columns), (t, h, w) = x.shape, layer.upsample_factor
    size = batch, channels, (frames - 1) * t + 1, rows * h, columns * w

    def fill(inner: Tensor) -> None:
        # (B, C, T, rows, h, columns, w), each place of which is written h * w times
        places = inner.unflatten(4, (columns, w)).unflatten(3, (rows, h))
        given = x[:, :, :, :, None, :, None]
        places[:, :, :1] = given[:, :, :1]
        places[:, :, 1:].unflatten(2, (frames - 1, t)).copy_(given[:, :, 1:, None])

    return _convolve(layer.conv.conv, _padded(layer.conv, size, x, fill))


def _causal_conv(conv: HunyuanVideoCausalConv3d, x: Tensor) -> Tensor:
    if any(conv.time_causal_padding):
        x = _padded(conv, x.shape, x, lambda inner: inner.copy_(x))
    return _convolve(conv.conv, x)


def _norm_silu_conv(norm: nn.GroupNorm, conv: HunyuanVideoCausalConv3d, x: Tensor) -> Tensor:
    padded = _padded(conv, x.shape, x, lambda inner: _normalise(norm, x, inner))
    # With its borders, so that it is a pass without gaps.
    return _convolve(conv.conv, F.silu(padded, inplace=True))


def _padded(
    conv: HunyuanVideoCausalConv3d, size: tuple[int, ...], like: Tensor, fill: Callable[[Tensor], object]
) -> Tensor:
    """What `fill` writes, (B, C, T, h, w) of `size`, with its outermost places repeated as a convolution asks for."""
    left, right, top, bottom, front, _ = conv.time_causal_padding
    batch, channels, frames, rows, columns = size
    padded = torch.empty(
        (batch, channels, front + frames, top + rows + bottom, left + columns + right),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last_3d,
    )
    later = padded[:, :, front:]
    middle = later[:, :, :, top : top + rows]
    inner = middle[..., left : left + columns]
    fill(inner)
    # Columns, then rows with their corners, then frames with both.
    middle[..., :left] = inner[..., :1]
    middle[..., left + columns :] = inner[..., -1:]
    later[:, :, :, :top] = middle[:, :, :, :1]
    later[:, :, :, top + rows :] = middle[:, :, :, -1:]
    padded[:, :, :front] = later[:, :, :1]
    return padded


def _convolve(layer: nn.Conv3d, x: Tensor) -> Tensor:
    could = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    if could and x.numel() >= ONEDNN_LEAST:
        # Stands for F.conv3d: these take no padding of their own.
        return torch.mkldnn_convolution(
            x, layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups
        )
    return layer(x)


def _normalise(norm: nn.GroupNorm, x: Tensor, out: Tensor) -> None:
    """Write x, (B, C, T, h, w), into `out` as group norm gives it."""
    if not x.is_cuda:
        out.copy_(norm(x))
        return
    scale, shift = scale_and_shift(norm, x)
    # Rounded once, to the type of `out`.
    torch.addcmul(shift, x, scale, out=out)


def scale_and_shift(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """By what group norm multiplies features on a GPU, (B, C, T, h, w), and what it adds: float32 (B, C, 1, 1, 1)."""
    pieces = [torch.batch_norm_stats(piece, norm.eps) for clip in x for piece in _pieces(clip)]
    # (B, pieces, groups, channels of a group); pieces are of one size
    split = len(x), -1, norm.num_groups, x.shape[1] // norm.num_groups
    mean, inverse = (torch.stack(one).view(split) for one in zip(*pieces))
    middle = mean.mean((1, 3), keepdim=True)
    # Of the group, from each channel's and how far channels lie apart; eps is in each channel's.
    variance = (inverse**-2 + (mean - middle) ** 2).mean((1, 3), keepdim=True)
    weight, bias = (one.float().view(split[2:]) for one in (norm.weight, norm.bias))
    scale = weight * variance.rsqrt()
    shape = len(x), x.shape[1], 1, 1, 1
    return scale.view(shape), (bias - middle * scale).view(shape)


def _pieces(clip: Tensor) -> Iterator[Tensor]:
    """Features (C, T, h, w) as (places, C), by frames if there are many: as batch norm's kernel takes them."""
    frames = clip.shape[1] if clip.numel() < MOST_NUMBERS else 1
    yield from (piece.movedim(0, -1).flatten(0, 2) for piece in clip.split(frames, dim=1))
