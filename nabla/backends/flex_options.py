"""FlexAttention's kernel options for blocks of a few tokens: measured where they are known, else found by trial, once.

The default options do not compile for 64-token blocks, and are half as fast where they do.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch._inductor.exc import InductorError

log = logging.getLogger("nabla")

Options = dict[str, int]
# The time of a problem for a device, dtype, head size and block with some options, infinity if they do not compile.
Trial = Callable[[torch.device, torch.dtype, int, int, Options], float]

TILE = 64
# Of all defaults of torch.
LARGEST_TILE = 128
TRIALS = 5
HOPPER = 9, 0
# Measured on one H200 for heads of 64 and of 128: eight warps are slower by half or more, loads without TMA by 3 % and
# by 7 %, four stages by 1 % and by up to half. Tiles of 32 keys are slower by a sixth.
MEASURED = {HOPPER: {"num_warps": 4, "num_stages": 3, "USE_TMA": True}}


@functools.cache
def for_forward(device: torch.device, dtype: torch.dtype, head_size: int, block: int, trial: Trial) -> Options:
    """The options for a device without gradients, as `kernel_options` of FlexAttention.

    What trials find is kept in a file of the user's cache, beside the versions that it holds for.
    """
    if device.type != "cuda":
        return {}
    tile = {"BLOCK_M": min(block, TILE), "BLOCK_N": min(block, TILE)}
    # What a program can have if it asks for it; torch's types leave it out.
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    # A stage is a tile of k and one of v; beside them lies a tile of q, half as much.
    stage = 2 * tile["BLOCK_N"] * head_size * dtype.itemsize
    stages = max(1, min(3, (room - stage // 2) // stage))
    known = MEASURED.get(torch.cuda.get_device_capability(device))
    if known is not None:
        return tile | known | {"num_stages": min(stages, known["num_stages"])}
    kind = device, dtype, head_size, block
    return remembered(_key(*kind), [tile | each for each in candidates(stages)], functools.partial(trial, *kind))


@functools.cache
def for_backward(
    device: torch.device, dtype: torch.dtype, head_size: int, block: int, forward: Trial, backward: Trial
) -> Options:
    """The options for a device where gradients are taken, of a forward that is run for them and of the backward."""
    kind = device, dtype, head_size, block
    # Short sequences would be given to another kernel, that of decoding, which has other options.
    given = {"SPARSE_Q_BLOCK_SIZE": block, "SPARSE_KV_BLOCK_SIZE": block, "FORCE_USE_FLEX_ATTENTION": True}
    given |= {f"fwd_{name}": value for name, value in for_forward(*kind, forward).items()}

    def trial(options: Options) -> float:
        return backward(*kind, given | options)

    return given | remembered(_key(*kind) + ", backward", backward_candidates(dtype, block), trial)


def candidates(stages: int) -> list[Options]:
    """Options worth a trial where up to `stages` stages fit into shared memory."""
    return [{"num_warps": 4, "num_stages": n} for n in range(1, stages + 1)] + [{"num_warps": 8, "num_stages": stages}]


def backward_candidates(dtype: torch.dtype, block: int) -> list[Options]:
    """Options of a backward that are worth a trial, from those for much shared memory to those that fit everywhere.

    Some programs do a tile of keys each and go over queries in smaller tiles, others do it the other way round.
    """
    wide, narrow, least = min(block, TILE), min(block, TILE // 2), min(block, TILE // 4)
    if dtype.itemsize > 2:
        # Small, large, warps, stages. Tiles of float32 take twice the shared memory.
        shapes = [(narrow, narrow, 4, 1), (least, narrow, 4, 1), (least, least, 4, 1)]
    else:
        shapes = [(wide, wide, 8, 3), (wide, wide, 4, 3), (narrow, wide, 4, 2)]
        shapes += [(narrow, narrow, 4, 1), (least, least, 4, 1)]
    return [
        {
            # M counts queries and N keys. Tiles 1 are of the programs for gradients of k and v, which go over queries;
            # tiles 2 of those for q, which go over keys. torch asserts that the large one is a multiple of the small.
            "bwd_BLOCK_M1": small,
            "bwd_BLOCK_N1": large,
            "bwd_BLOCK_M2": large,
            "bwd_BLOCK_N2": small,
            "bwd_num_warps": warps,
            "bwd_num_stages": stages,
        }
        for small, large, warps, stages in shapes
    ]


def _key(device: torch.device, dtype: torch.dtype, head_size: int, block: int) -> str:
    name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, {dtype}, heads of {head_size}, blocks of {block}"


def seconds(run: Callable[[], object], device: torch.device, options: Options) -> float:
    """The time of a run with some options, infinity if they do not compile."""
    try:
        # Compiles; what is timed comes after it.
        run()
    except InductorError as error:
        log.info("%s do not compile: %s", options, str(error).strip().splitlines()[0])
        return math.inf
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(TRIALS):
        run()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / TRIALS


def remembered(key: str, options: Iterable[Options], seconds: Callable[[Options], float]) -> Options:
    """The fastest of some options, from the cache file if it knows the key, else by trial and then into the file."""
    path = cache_file()
    known = _read(path)
    if key not in known:
        log.info("looking for the fastest FlexAttention options: %s", key)
        best, chosen = min(((seconds(each), each) for each in options), key=lambda pair: pair[0])
        if best == math.inf:
            raise RuntimeError(f"no options of FlexAttention compile for {key}")
        log.info("found %s, %.2f ms in the trial", chosen, 1000 * best)
        known[key] = chosen
        _write(path, known)
    return known[key]


def cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "nabla" / "flex_options.json"


@functools.cache
def _read(path: Path) -> dict[str, Options]:
    """What the file holds that is whole; kept, so that a disk that cannot be written costs one trial."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: each for key, each in known.items() if _are_options(each)} if isinstance(known, dict) else {}


def _are_options(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(number, int) for number in value.values())


def _write(path: Path, known: dict[str, Options]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8", delete=False) as file:
            json.dump(known, file, indent=1)
        # Whole or not at all, since other processes may read and write it meanwhile.
        os.replace(file.name, path)
    except OSError as error:
        log.warning("warning: cannot keep the options found in %s (%s); the next run looks again", path, error)
