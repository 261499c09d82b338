"""Weight files and their JSON, written from a stream of tensors of which one file's are held at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nabla import InputError
from wan.files.atomic import settle

# Of the tensors that are held at once as well, since a file is written in one call.
SHARD_BYTES = 5 * 2**30
# As safetensors' header names them.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def save_json(content: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def save_pickle(state: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as the published .pth files hold them."""
    with _writing(file):
        torch.save(dict(state), file)


def save_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, stem: str) -> None:
    """Write the safetensors that `WeightFiles.find` reads: one file, or several of `SHARD_BYTES` and their index."""
    held: list[list[str]] = []
    total = 0
    for shard in _shards(tensors):
        file = folder / f"{stem}-{len(held) + 1:05d}"
        with _writing(file):
            # One key, as diffusers and transformers write: several are written in any order, so that equal data would
            # make unequal files.
            save_file(shard, file, {"format": "pt"})
        held.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(held) == 1:
        os.replace(folder / f"{stem}-00001", folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard_names in enumerate(held, start=1):
        # How many there are is known only now.
        name = f"{stem}-{number:05d}-of-{len(held):05d}.safetensors"
        os.replace(folder / f"{stem}-{number:05d}", folder / name)
        weight_map |= dict.fromkeys(shard_names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    save_json(index, folder / f"{stem}.safetensors.index.json")


def save_whole(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, file: Path
) -> None:
    """Write one safetensors file of any size, of which one tensor is held at a time.

    shapes: of all tensors, which are of one dtype and come in this order
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    # Data begins at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with _writing(file), open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), (known, shape) in zip(tensors, shapes.items(), strict=True):
            assert (name, tuple(tensor.shape), tensor.dtype) == (known, shape, dtype)
            out.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        # A tensor that is larger than a shard has a file of its own.
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        # safetensors refuses tensors whose numbers are not in order.
        shard[name] = tensor.contiguous()
    yield shard


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Turn what the libraries raise for a full disk, each in its own way, into one clear line."""
    try:
        yield
        settle(file)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{file} cannot be written ({' '.join(str(error).split())[:200]}); is the disk full?"
        ) from error
