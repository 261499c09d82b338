"""What a run takes of memory, in bytes, computed from shapes: weights, a forward, a decode. On the large side."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nabla import NablaConfig
from wan.quantize.table import QUANTIZATIONS

GIB = 2**30
# Host memory for streamed blocks is asked for in pieces of this size at most, unless a block is larger.
CHUNK = 4 * GIB
# Where tensors may begin in a block's memory, as CUDA's own allocations do.
ALIGNMENT = 256
# Of the whole video while it is put together from decoded frames.
VIDEO_COPIES = 3
FLOAT32_BYTES = 4
# Pixels that columns share, as diffusers' own tiles do: 256 wide, 192 apart.
TILE_OVERLAP = 64
MOST_TILES = 8
# A tile of attention, and what edge tiles that are partial add.
BLOCK_TOKENS, PADDING = math.prod(NablaConfig().tile), 1.07
# Of blocks that are not compiled, which normalise and modulate in float32: copies of the hidden states more.
EAGER_COPIES = 6
# Of the lists of kept blocks, which are made for as many heads at a time: `LIST_ENTRIES` of `nabla.attention`, an entry
# of 8 bytes where full and partial tiles have lists of their own.
LIST_BYTES = 2**28 * 8


@dataclass(frozen=True)
class Weights:
    """What a model weighs. One of its blocks: `linear` numbers in linear layers, and `other` bytes; the largest layer
    has `largest` numbers. Outside of its blocks: `rest` bytes. A number that is not quantised takes `itemsize` bytes.
    stored: of a block as a GGUF file has quantised it, and of what runs beside it.
    less_linear, less_other: where blocks are not alike and the largest stands for all, what the others have less, all
    together."""

    blocks: int
    linear: int
    largest: int
    other: int
    rest: int
    itemsize: int
    stored: int = 0
    less_linear: int = 0
    less_other: int = 0

    def block(self, quantization: str | None) -> int:
        """Bytes of the largest block."""
        each = self._bytes_per_weight(quantization)
        return self.stored if each is None else math.ceil(self.linear * each) + self.other

    def bytes(self, quantization: str | None) -> int:
        each = self._bytes_per_weight(quantization)
        # What a file has quantised is known of its largest block alone.
        less = 0 if each is None else int(self.less_linear * each) + self.less_other
        return self.blocks * self.block(quantization) - less + self.rest

    def streamed(self, quantization: str | None, kept: int = 0) -> int:
        """Bytes on the GPU while all blocks but `kept` pass through two buffers."""
        return min(self.bytes(quantization), self.rest + self.block(quantization) * (kept + 2))

    def _bytes_per_weight(self, quantization: str | None) -> float | None:
        return self.itemsize if quantization is None else QUANTIZATIONS[quantization].bytes_per_weight


@dataclass(frozen=True)
class Decoding:
    """What a VAE's decoder makes, or what its encoder is given.

    size: (width, height) in pixels
    itemsize: bytes of a number of its activations
    pixel_bytes: what its features take for each pixel of a frame
    window: frames that are decoded at a time, in all columns, and then kept in float32; 0 if each column is decoded in
        all frames
    """

    size: tuple[int, int]
    frames: int
    itemsize: int
    pixel_bytes: float
    window: int = 0


@dataclass(frozen=True)
class Workload:
    """A video, and the widths of the models that make it.

    tokens, dim, ffn_dim, heads: of the transformer; text_dim: of the text encoder
    itemsize: bytes of a number of the transformer's activations
    mask_layers: layers that keep their choice of blocks for later steps
    cached: copies of the hidden states that a step cache keeps
    writing: bytes that writing a prompt out takes beside the text encoder's weights, where it does
    beside: bytes of what else a forward holds, such as tables of rotations
    encoding: what the VAE encodes of what is given, where anything is; given: bytes that lie beside it meanwhile
    """

    tokens: int
    dim: int
    ffn_dim: int
    heads: int
    text_dim: int
    decoding: Decoding
    itemsize: int = 2
    compiled: bool = True
    mask_layers: int = 0
    cached: int = 0
    writing: int = 0
    beside: int = 0
    encoding: Decoding | None = None
    given: int = 0


def forward_bytes(workload: Workload) -> int:
    """What a forward of a batch of one takes beside the weights."""
    hidden = workload.tokens * workload.dim * workload.itemsize
    # The residual, the normalised input, and the wide states with the result; or q, k, v and the result, as tiles.
    copies = max(3 + workload.ffn_dim / workload.dim, 2 + 4 * PADDING) + (0 if workload.compiled else EAGER_COPIES)
    # Of blocks of queries and of keys, whose lists take 8 bytes each and a kept choice one.
    pairs = workload.heads * math.ceil(workload.tokens / BLOCK_TOKENS * PADDING) ** 2
    lists = min(LIST_BYTES, 8 * pairs) + workload.mask_layers * pairs
    return math.ceil((copies + workload.cached) * hidden) + lists + workload.beside


def text_bytes(workload: Workload, rows: int = 512, prompts: int = 2) -> int:
    """What text takes beside the weights: encoding it, or writing a prompt out, whichever takes more.

    Of encoding: scores of heads of 64 and wide states, in float32 for the softmax.
    """
    # Both prompts of guidance are encoded together; scores (prompts, heads, rows, rows) are there three times.
    heads = max(1, workload.text_dim // 64)
    return max(workload.writing, prompts * rows * (heads * rows * 4 * 3 + workload.text_dim * 4 * 16))


def decode_bytes(decoding: Decoding, tiles: int = 1) -> int:
    """What decoding, or encoding, takes beside the weights, in columns that overlap."""
    width, height = decoding.size
    column = min(width, tile_width(width, tiles))
    features = column * height * decoding.pixel_bytes
    # diffusers holds all decoded columns, with what they share, until it joins them.
    joined = VIDEO_COPIES if tiles == 1 else VIDEO_COPIES + tiles * column / width
    numbers = min(decoding.window or decoding.frames, decoding.frames) * width * height * 3
    decoded = features + joined * numbers * decoding.itemsize
    if not decoding.window:
        return math.ceil(decoded)
    # Earlier windows lie there while the last one is decoded; then all of them are put together.
    video = decoding.frames * width * height * 3 * FLOAT32_BYTES
    return math.ceil(max(decoded + video, VIDEO_COPIES * video))


def tile_width(width: int, tiles: int) -> int:
    """Width in pixels of the columns, a multiple of 16, that overlap by `TILE_OVERLAP` and cover a picture."""
    return width if tiles == 1 else math.ceil(width / tiles / 16) * 16 + TILE_OVERLAP


def pinned_chunks(block: int, blocks: int) -> list[int]:
    """How many blocks lie in each chunk of pinned memory, which torch rounds up to powers of two."""
    size, chunks = -(-block // ALIGNMENT) * ALIGNMENT, []
    while blocks:
        # The largest power of two that what is left can fill, filled with whole blocks, so that rounding up adds
        # little; a block that is larger than that has a piece of its own.
        whole = 2 ** (min(blocks * size, CHUNK).bit_length() - 1)
        chunks.append(max(1, min(blocks, whole // size)))
        blocks -= chunks[-1]
    return chunks


def pinned_bytes(block: int, blocks: int) -> int:
    """Host memory that so many blocks take as chunks."""
    size = -(-block // ALIGNMENT) * ALIGNMENT
    return sum(2 ** (count * size - 1).bit_length() for count in pinned_chunks(block, blocks))
