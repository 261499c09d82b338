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
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

log = logging.getLogger("nabla")

Options = dict[str, int]

TILE = 64
HOPPER = 9, 0
# Measured on one H200: eight warps or four stages are slower by half, loads without TMA by 7 %.
MEASURED = {HOPPER: {"num_warps": 4, "num_stages": 3, "USE_TMA": True}}


@functools.cache
def for_device(
    device: torch.device, dtype: torch.dtype, head_size: int, block: int, seconds: Callable[..., float]
) -> Options:
    """The options for a device, as `kernel_options` of FlexAttention.

    seconds: given the four values and options, the time of a trial, infinity if they do not compile
    What trials find is kept in a file of the user's cache, beside the versions that it holds for.
    """
    if device.type != "cuda":
        return {}
    tile = {"BLOCK_M": min(block, TILE), "BLOCK_N": min(block, TILE)}
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    stage = 2 * tile["BLOCK_N"] * head_size * dtype.itemsize
    stages = max(1, min(3, (room - stage // 2) // stage))
    known = MEASURED.get(torch.cuda.get_device_capability(device))
    if known is not None:
        return tile | known | {"num_stages": min(stages, known["num_stages"])}
    name = torch.cuda.get_device_name(device)
    key = f"{name}, torch {torch.__version__}, {dtype}, heads of {head_size}, blocks of {block}"
    trial = functools.partial(seconds, device, dtype, head_size, block)
    return remembered(key, [tile | options for options in candidates(stages)], trial)


def candidates(stages: int) -> list[Options]:
    """Options worth a trial where up to `stages` stages fit into shared memory."""
    return [{"num_warps": 4, "num_stages": n} for n in range(1, stages + 1)] + [{"num_warps": 8, "num_stages": stages}]


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
    """What the file holds, nothing if it is damaged; kept, so that a disk that cannot be written costs one trial."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, Options]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8", delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("warning: cannot keep the options found in %s (%s); the next run looks again", path, error)
