"""Block-sparse attention by NVIDIA's cuDNN frontend, an optional requirement (requirements-cudnn.txt)."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from nabla import probe
from nabla.block_lists import BlockLists, from_lists
from nabla.dropped import TileMeans
from nabla.kernels.block_lists import lists_of_blocks
from nabla.kernels.block_selection import choose_lists
from nabla.kernels.dropped_means import join_means_of_lists
from nabla.selection import Selection
from nabla.tiling import TileLayout

DTYPES: tuple[torch.dtype, ...] | None = (torch.bfloat16, torch.float16)
HEAD_SIZES: tuple[int, ...] | None = (64, 96, 128)
# Of blocks of 64 tokens, all that is taken beyond Hopper, and all that has gradients.
EVERYWHERE = 128
BLOCK = 64
HOPPER, BLACKWELL, CONSUMER_BLACKWELL = (9, 0), (10, 0), (12, 0)


class Blocks(NamedTuple):
    """Kept blocks, and the valid tokens of every key tile (N,) int32, or None where all tiles are full."""

    lists: BlockLists
    sizes: Tensor | None


def unsupported_reason(
    device: torch.device, block: int, dtype: torch.dtype | None = None, head_size: int | None = None
) -> str:
    """Why this backend cannot run blocks of `block` tokens on a device, or ""."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < HOPPER:
        return "needs an NVIDIA GPU of compute capability 9.0 or more"
    if block != BLOCK:
        return f"takes blocks of {BLOCK} tokens, not {block}"
    major, minor = capability = torch.cuda.get_device_capability(device)
    if capability >= BLACKWELL and head_size not in (None, EVERYWHERE):
        return f"takes heads of {EVERYWHERE}, not {head_size}, on compute capability {major}.{minor}"
    if BLACKWELL <= capability < CONSUMER_BLACKWELL and dtype not in (None, torch.bfloat16):
        return f"takes torch.bfloat16, not {dtype}, on compute capability {major}.{minor}"
    if importlib.util.find_spec("cudnn") is None:
        return "not installed, see requirements-cudnn.txt"
    return ""


def backward_unsupported_reason(
    device: torch.device, dtype: torch.dtype | None = None, head_size: int | None = None
) -> str:
    """Why this backend has no gradients on a device, of q, k and v of a dtype and head size, or ""."""
    # Asked only where `unsupported_reason` has nothing to say, so the device is a GPU.
    if torch.cuda.get_device_capability(device) >= CONSUMER_BLACKWELL:
        return "has no backward on compute capability 12.0 or more"
    if dtype not in (None, torch.bfloat16):
        return f"has no backward in {dtype}"
    return "" if head_size in (None, EVERYWHERE) else f"has no backward for heads of {head_size}"


def prepare(block_mask: Tensor, layout: TileLayout) -> Blocks:
    """A block mask (B or 1, heads or 1, N, N) bool -> what `attend` needs of it."""
    (lists,) = lists_of_blocks(block_mask)
    return Blocks(lists, _sizes(layout))


def choose(q: Tensor, k: Tensor, selection: Selection) -> Blocks:
    """The blocks that block means q and k (B, heads, N, D) choose, prepared."""
    (lists,) = choose_lists(q, k, selection)
    return Blocks(lists, _sizes(selection.layout))


def block_counts(blocks: Blocks) -> Tensor:
    """How many key blocks each query block keeps: (B or 1, heads or 1, N)."""
    return blocks.lists.counts


def dropped_unsupported_reason(device: torch.device) -> str:
    """Why this backend cannot have means stand for dropped blocks on a device, or ""."""
    return ""


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, means: TileMeans | None = None) -> Tensor:
    """Attention of q, k, v (B, heads, N * block, D) in tile order over the kept blocks; same shape and dtype.

    means: what stands for the others, None for nothing
    """
    out, log_sums = block_sparse(q, k, v, *blocks.lists, blocks.sizes)
    return out if means is None else join_means_of_lists(q, out, log_sums, [blocks.lists], means)


@torch.library.custom_op("nabla::cudnn", mutates_args=())
def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, sizes: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """The attention, and the natural logarithm (B, heads, N * block) float32 of the sum of each row's exponentials."""
    from cudnn.block_sparse_attention import block_sparse_attention_forward

    probe.see(lambda: counts, lambda heads: from_lists(BlockLists(counts[:, heads], indices[:, heads])))
    lists = _sparsity(q, counts, indices, sizes)
    result = probe.run(probe.ATTENTION, block_sparse_attention_forward, q, k, v, **lists)
    return result["o_tensor"], result["lse_tensor"]


@block_sparse.register_fake
def _(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("nabla::cudnn_backward", mutates_args=())
def block_sparse_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    counts: Tensor,
    indices: Tensor,
    sizes: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. The sums over blocks are atomic, so that they are not the same to the bit each time."""
    from cudnn.block_sparse_attention import block_sparse_attention_backward

    # The kernel loads whole rows, of which a gradient that was expanded has none.
    if gradient.stride(-1) != 1 or 0 in gradient.stride():
        gradient = gradient.contiguous()
    # The library hands tensors on in a way that refuses those that require gradients.
    given = (x.detach() for x in (gradient, q, k, v, out, log_sums))
    result = block_sparse_attention_backward(*given, **_sparsity(q, counts, indices, sizes))
    return result["dq_tensor"], result["dk_tensor"], result["dv_tensor"]


@block_sparse_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *sparsity = inputs
    ctx.save_for_backward(q, k, v, *output, *sparsity)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    # `attend` drops the logarithms, so nothing comes back for them.
    return *block_sparse_backward(gradient, *ctx.saved_tensors), None, None, None


block_sparse.register_autograd(_backward, setup_context=_keep_for_backward)


def _sparsity(q: Tensor, counts: Tensor, indices: Tensor, sizes: Tensor | None) -> dict[str, Any]:
    """The kept blocks as the library's arguments."""
    # A window's lists are of one head for all. Views, without a copy.
    rows = *q.shape[:2], counts.shape[-1]
    return {
        "q2k_block_index": indices.expand(*rows, -1),
        "q2k_block_nums": counts.expand(rows),
        "block_sizes": sizes,
        "sparse_block_size": BLOCK,
    }


def _sizes(layout: TileLayout) -> Tensor | None:
    # Read as: the first so many tokens of a tile count, which is how tiles are laid out.
    return layout.sizes if layout.has_partial_tiles else None
