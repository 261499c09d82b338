"""Means of dropped tiles joined to an attention over kept ones, on a GPU, in one pass over the means.

Every query goes over the means of all tiles as in FlashAttention (arXiv 2205.14135), whose running softmax begins with
what the attention over kept tiles ended with: its result, and the logarithm of its sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla import probe
from nabla.block_lists import BlockLists, from_lists
from nabla.dropped import TileMeans, join_means
from nabla.kernels.gpu import can_run, tl, triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Queries of a program, in two halves that are of one tile each.
ROWS = 128
# Means at a time, of half precision and of float32.
KEYS = {2: 64, 4: 32}
# Of tensor cores.
LEAST = 16
# What is added to scores has a number for each pair of tiles; heads are taken in groups of at most so many.
BIAS_ENTRIES = 2**24
# Weights are powers of two, up to which they and their sums are finite.
LIMITS = {torch.bfloat16: 100.0, torch.float32: 100.0, torch.float16: 14.0}
MARKED = 128


def join_means_of_lists(
    q: Tensor, out: Tensor, log_sums: Tensor, lists: Sequence[BlockLists], means: TileMeans
) -> Tensor:
    """`nabla.dropped.join_means`, of kept blocks in one or two lists; the result is written over `out`."""
    (counts, indices), (more_counts, more_indices) = lists[0], (lists[1] if len(lists) > 1 else (None, None))
    _join(q, out, log_sums, counts, indices, more_counts, more_indices, *means)
    return out


@torch.library.custom_op("nabla::join_means", mutates_args=("out",))
def _join(
    q: Tensor,
    out: Tensor,
    log_sums: Tensor,
    counts: Tensor,
    indices: Tensor,
    more_counts: Optional[Tensor],
    more_indices: Optional[Tensor],
    k_means: Tensor,
    v_means: Tensor,
    sizes: Tensor,
) -> None:
    lists = [BlockLists(counts, indices)]
    if more_counts is not None and more_indices is not None:
        lists.append(BlockLists(more_counts, more_indices))
    join = join_in_one_pass if applies(q, len(sizes)) else _join_by_torch
    probe.run(probe.ATTENTION, join, q, out, log_sums, lists, TileMeans(k_means, v_means, sizes))


def _join_by_torch(q: Tensor, out: Tensor, log_sums: Tensor, lists: Sequence[BlockLists], means: TileMeans) -> None:
    out.copy_(join_means(q, out, log_sums, from_lists(*lists), means))


def applies(q: Tensor, blocks: int) -> bool:
    """Whether the kernel can take queries (B, heads, N * block, D)."""
    return can_run(q) and q.dtype in DTYPES and 2 * _half(q, blocks) >= LEAST and _stages(q) > 0


def _width(q: Tensor) -> int:
    """The head size, filled up to a power of two."""
    return max(LEAST, triton.next_power_of_2(q.shape[-1]))


def _stages(q: Tensor) -> int:
    """How many rounds of mean keys and values fit into shared memory beside the queries, up to two."""
    # What a program can have if it asks for it; torch's types leave it out.
    room = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    row = _width(q) * q.element_size()
    # Of float32 queries the products by three of TF32 take a copy.
    queries = ROWS * row * (2 if q.dtype == torch.float32 else 1)
    return min(2, (room - queries) // (2 * KEYS[q.element_size()] * row))


def _half(q: Tensor, blocks: int) -> int:
    """Half of a program's queries, which are of one tile."""
    return math.gcd(q.shape[2] // blocks, ROWS // 2)


def join_in_one_pass(q: Tensor, out: Tensor, log_sums: Tensor, lists: Sequence[BlockLists], means: TileMeans) -> None:
    """`join_means_of_lists` by the kernel."""
    dim, blocks, keys = q.shape[-1], len(means.sizes), KEYS[q.element_size()]
    # Filled up, so that the kernel reads them without masks.
    more = (0, _width(q) - dim, 0, -blocks % keys)
    # With what turns scores into powers of two, in one rounding.
    k = F.pad(means.k * (dim**-0.5 * math.log2(math.e)), more).to(q.dtype).contiguous()
    v = F.pad(means.v, more).to(q.dtype).contiguous()
    log_sizes = F.pad(means.sizes.float().log2(), (0, more[-1]), value=-math.inf)
    # By it and a query's length its scores are bounded.
    longest = k.float().norm(dim=-1).amax(dim=-1)
    group = max(1, BIAS_ENTRIES // (q.shape[0] * blocks * len(log_sizes)))
    with torch.cuda.device(q.device):
        for start in range(0, q.shape[1], group):
            of = slice(start, start + group)
            # A window's lists are of one head for all.
            of_heads = [BlockLists(*(x.expand(*q.shape[:2], *x.shape[2:])[:, of] for x in each)) for each in lists]
            bias = _bias(of_heads, log_sizes)
            _join_heads(q[:, of], out[:, of], log_sums[:, of], bias, k[:, of], v[:, of], longest[:, of])


def _bias(lists: Sequence[BlockLists], log_sizes: Tensor) -> Tensor:
    """What to add to scores: the logarithms of sizes where a block is dropped, -inf where it is kept."""
    counts = lists[0].counts
    batch, heads, blocks = counts.shape
    bias = log_sizes.expand(batch, heads, blocks, -1).contiguous()
    for one in lists:
        strides = *one.counts.stride()[:2], *one.indices.stride()[:2]
        _mark_row[(blocks, heads, batch)](*one, bias, *strides, blocks, bias.shape[-1], MARKED=MARKED, num_warps=1)
    return bias


def _join_heads(q: Tensor, out: Tensor, log_sums: Tensor, bias: Tensor, k: Tensor, v: Tensor, longest: Tensor) -> None:
    batch, heads, tokens, dim = q.shape
    blocks, half = bias.shape[2], _half(q, bias.shape[2])
    grid = triton.cdiv(tokens, 2 * half), heads, batch
    is_steady = torch.empty(grid[::-1], dtype=torch.int8, device=q.device)
    for steady in (True, False):
        _join_rows[grid](
            q,
            out,
            log_sums,
            bias,
            k,
            v,
            longest,
            is_steady,
            *(stride for each in (x.stride() for x in (q, out, log_sums)) for stride in each),
            *k.stride()[:2],
            *longest.stride(),
            tokens,
            blocks,
            bias.shape[-1],
            LIMIT=LIMITS[q.dtype] - math.log2(tokens // blocks),
            DIM=dim,
            WIDTH=k.shape[-1],
            BLOCK=tokens // blocks,
            HALF=half,
            KEYS=KEYS[q.element_size()],
            PRECISION="tf32x3",
            STEADY=steady,
            **_options(q),
        )


def _options(q: Tensor) -> dict[str, int]:
    """How the kernel is compiled."""
    options = {"num_warps": 8, "num_stages": _stages(q)}
    # Two programs a multiprocessor, one of which multiplies while the other takes powers. On an H200 with heads of 128
    # one took 7.3 ms where two take 5.3, spilled registers included.
    return options | ({"maxnreg": 128} if q.element_size() == 2 and _width(q) <= ROWS else {})


if triton is not None:
    LOG2_E = tl.constexpr(math.log2(math.e))

    @triton.jit
    def _mark_row(
        counts,
        indices,
        bias,
        counts_batch,
        counts_head,
        indices_batch,
        indices_head,
        blocks,
        filled,
        MARKED: tl.constexpr,
    ):
        """Write -inf where the list of a row has blocks."""
        row, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        indices += batch * indices_batch + head * indices_head + row * blocks
        bias += ((batch * tl.num_programs(1) + head) * blocks + row) * filled
        count = tl.load(counts + batch * counts_batch + head * counts_head + row)
        for start in range(0, count, MARKED):
            place = start + tl.arange(0, MARKED)
            number = tl.load(indices + place, mask=place < count, other=0)
            tl.store(bias + number, tl.full((MARKED,), float("-inf"), tl.float32), mask=place < count)

    @triton.jit
    def _join_rows(
        q,
        out,
        log_sums,
        bias,
        k,
        v,
        longest,
        is_steady,
        q_batch,
        q_head,
        q_token,
        q_number,
        out_batch,
        out_head,
        out_token,
        out_number,
        sums_batch,
        sums_head,
        sums_token,
        means_batch,
        means_head,
        longest_batch,
        longest_head,
        tokens,
        blocks,
        filled,
        LIMIT: tl.constexpr,
        DIM: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        HALF: tl.constexpr,
        KEYS: tl.constexpr,
        PRECISION: tl.constexpr,
        STEADY: tl.constexpr,
    ):
        """2 * HALF queries of one head of one sample, those of each half being of one tile.

        STEADY: do those whose weights are bounded, for which the running maximum stays what it is at first, and say
            which these are; else do the others
        """
        head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        is_steady += (batch * tl.num_programs(1) + head) * tl.num_programs(0) + tl.program_id(0)
        if not STEADY:
            if tl.load(is_steady) != 0:
                return
        start = tl.program_id(0) * 2 * HALF
        row, depth, key = tl.arange(0, 2 * HALF), tl.arange(0, WIDTH), tl.arange(0, KEYS)
        token = (start + row).to(tl.int64)
        there = (token[:, None] < tokens) & (depth < DIM)
        q += batch * q_batch + head * q_head + token[:, None] * q_token + depth * q_number
        queries = tl.load(q, mask=there, other=0.0)
        out += batch * out_batch + head * out_head + token[:, None] * out_token + depth * out_number
        result = tl.load(out, mask=there, other=0.0).to(tl.float32)
        log_sums += batch * sums_batch + head * sums_head
        # In powers of two what the result was divided by: now the running maximum.
        highest = tl.load(log_sums + token * sums_token, mask=token < tokens, other=0.0) * LOG2_E
        # (2, KEYS), of the tile of each half; (WIDTH, KEYS) of k, read transposed; (KEYS, WIDTH) of v.
        tile = tl.minimum((start + tl.arange(0, 2) * HALF) // BLOCK, blocks - 1)
        bias += ((batch * tl.num_programs(1) + head) * blocks + tile[:, None]) * filled + key
        k += batch * means_batch + head * means_head + key[None, :] * WIDTH + depth[:, None]
        v += batch * means_batch + head * means_head + key[:, None] * WIDTH + depth
        goes = True
        if STEADY:
            length = tl.sqrt(tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1))
            bound = length * tl.load(longest + batch * longest_batch + head * longest_head)
            goes = tl.max(bound - highest, 0) < LIMIT
            tl.store(is_steady, goes.to(tl.int8))
        if goes:
            result = _go_over(result, highest, queries, bias, k, v, filled, HALF, WIDTH, KEYS, PRECISION, STEADY)
            tl.store(out, result.to(out.dtype.element_ty), mask=there)

    @triton.jit
    def _go_over(
        result,
        highest,
        queries,
        bias,
        k,
        v,
        filled,
        HALF: tl.constexpr,
        WIDTH: tl.constexpr,
        KEYS: tl.constexpr,
        PRECISION: tl.constexpr,
        STEADY: tl.constexpr,
    ):
        """A result of queries joined by all means, `highest` being the logarithm of what it was divided by."""
        total = tl.full((2 * HALF,), 1.0, tl.float32)
        for column in range(0, filled, KEYS):
            # By a third axis, so that each thread reads what is for its own rows.
            of_tiles = tl.load(bias + column)[:, None, :]
            scores = tl.broadcast_to(of_tiles, (2, HALF, KEYS)).reshape(2 * HALF, KEYS)
            scores = tl.dot(queries, tl.load(k + column * WIDTH), scores, input_precision=PRECISION)
            if not STEADY:
                # Finite from the first, so that -inf less it is -inf.
                higher = tl.maximum(highest, tl.max(scores, 1))
                before = tl.exp2(highest - higher)
                result, total, highest = result * before[:, None], total * before, higher
            weight = tl.exp2(scores - highest[:, None])
            total += tl.sum(weight, 1)
            values = tl.load(v + column * WIDTH)
            result = tl.dot(weight.to(values.dtype), values, result, input_precision=PRECISION)
        return result / total[:, None]
