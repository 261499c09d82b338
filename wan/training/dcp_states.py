"""States of runs as torch.distributed.checkpoint writes them, read without running what a file may ask for.

Torch itself unpickles a state's metadata, and its values other than tensors, and a pickle can run code.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint._traverse import get_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

METADATA_FILE = ".metadata"
# Far beyond that of a large model's state over hundreds of processes.
MAX_BYTES = 256 * 2**20
# As torch names them: process, number of the file.
DATA_FILE = re.compile(r"__\d+_\d+\.distcp")

DCP = "torch.distributed.checkpoint"
OBJECTS = {
    (f"{DCP}.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "StorageMeta",
    )
} | {(f"{DCP}.filesystem", "_StorageInfo")}
# What stands for its arguments: sizes, and what is not looked at, as where a state was first written.
CALLS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Of pickle's operations, those by which protocol 4 writes a state's metadata; every other one is refused.
VALUES = ("SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
SKIPPED = ("PROTO", "FRAME")


class SafeReader(FileSystemReader):
    """As torch's, without its pickle: the metadata is read as plain values, of which only known ones are built."""

    # Why the metadata could not be read, of which torch tells other processes alone.
    failure: Exception | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            return self._read_metadata()
        except (OSError, ValueError) as error:
            self.failure = error
            raise

    def _read_metadata(self) -> Metadata:
        path = Path(self.path) / METADATA_FILE
        with path.open("rb") as file:
            # A byte more tells that it is too large.
            content = file.read(MAX_BYTES + 1)
        try:
            if len(content) > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
            metadata = parse_metadata(content)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{METADATA_FILE} does not hold what a state's holds: {str(error)[:100]}") from None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """As torch's, but values other than tensors are plain, and of the kinds of those that they take the place of."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        path = self.mappings[name]
        read = torch.load(value, map_location="cpu", weights_only=True)
        if not _is_like(read, get_element(self.original_state_dict, path)):
            raise ValueError(f"{name} holds a {type(read).__name__} that it cannot be")
        set_element(self.original_state_dict, path, read)


def _is_like(value: Any, before: Any) -> bool:
    # Exact types, since bool is a subclass of int.
    if type(before) in (int, float):
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(before, (list, tuple)):
        return type(value) is type(before) and len(value) == len(before) and all(map(_is_like, value, before))
    return type(value) is type(before)


class _Object:
    """One of `OBJECTS` as a pickle gives it: its name, and its state once that is known."""

    def __init__(self, name: str):
        self.name, self.state = name, None

    def of(self, name: str) -> Any:
        if self.name != name:
            raise ValueError(f"{self.name} in place of {name}")
        return self.state


def parse_metadata(content: bytes) -> Metadata:
    """A state's metadata of the pickle that torch writes; raises an error of nearly any class for another content."""
    state = _plain(content).of("Metadata")
    described = {_text(name): _described(one) for name, one in state["state_dict_metadata"].items()}
    stored = dict(map(_stored, state["storage_data"].items()))
    return Metadata(described, storage_data=stored, version=state.get("version") and _text(state["version"]))


def _described(one: _Object) -> TensorStorageMetadata | BytesStorageMetadata:
    if one.name == "BytesStorageMetadata":
        return BytesStorageMetadata()
    state = one.of("TensorStorageMetadata")
    # Of the tuple that `TensorProperties.__getstate__` gives; torch calls all fields after the first deprecated.
    dtype = state["properties"].of("TensorProperties")[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without a type")
    size = _size(state["size"])
    parts = [part.of("ChunkStorageMetadata") for part in state["chunks"]]
    chunks = [ChunkStorageMetadata(_size(part["offsets"]), _size(part["sizes"])) for part in parts]
    # Torch reads what overlaps the tensor asked for and leaves the rest as it is, so a gap would go unnoticed.
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError("parts of a tensor that are not the whole")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _stored(item: tuple[_Object, _Object]) -> tuple[MetadataIndex, _StorageInfo]:
    key, place = item[0].of("MetadataIndex"), item[1].of("_StorageInfo")
    offset, index = key.get("offset"), key.get("index")
    file = _text(place["relative_path"])
    # Torch joins it to the folder as it is, so "../x" would lead out; descriptors name extensions to run on the bytes.
    if not DATA_FILE.fullmatch(file) or place.get("transform_descriptors"):
        raise ValueError(f"a part in {file[:60]!r}")
    (start, length) = _size((place["offset"], place["length"]))
    index = MetadataIndex(
        _text(key["fqn"]), None if offset is None else _size(offset), None if index is None else _size((index,))[0]
    )
    return index, _StorageInfo(file, start, length)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} in place of a text")
    return value


def _size(value: Any) -> torch.Size:
    if not (isinstance(value, tuple) and all(type(one) is int and 0 <= one < 2**63 for one in value)):
        raise ValueError("a size that is none")
    return torch.Size(value)


def _plain(content: bytes) -> Any:
    """The value of a pickle of known objects, sizes and plain values alone; nothing of it is imported or called."""
    machine = _Machine()
    for operation, argument, _ in pickletools.genops(content):
        if operation.name == "STOP":
            return machine.stack.pop()
        machine.run(operation.name, argument)
    raise ValueError("it is cut")


class _Machine:
    """Pickle's stack of values, for the operations that the metadata of a state needs."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        # MEMOIZE numbers values in the order in which they come.
        self.memo: list[Any] = []
        # Heights of the stack at which marks were set, in place of mark objects on it.
        self.marks: list[int] = []

    def run(self, name: str, argument: Any) -> None:
        if name in SKIPPED:
            return
        if name in VALUES:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif method := getattr(self, f"_{name.lower()}", None):
            method()
        else:
            raise ValueError(f"the operation {name} of a pickle")

    def _memoize(self) -> None:
        self.memo.append(self.stack[-1])

    def _mark(self) -> None:
        self.marks.append(len(self.stack))

    def _since_mark(self) -> list[Any]:
        first = self.marks.pop()
        taken = self.stack[first:]
        del self.stack[first:]
        return taken

    def _tuple(self) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self) -> None:
        self._tuple_of(1)

    def _tuple2(self) -> None:
        self._tuple_of(2)

    def _tuple3(self) -> None:
        self._tuple_of(3)

    def _tuple_of(self, count: int) -> None:
        # As if a mark stood before the last `count` values; likewise for the other operations that take a fixed number.
        self.marks.append(len(self.stack) - count)
        self._tuple()

    def _append(self) -> None:
        self.marks.append(len(self.stack) - 1)
        self._appends()

    def _appends(self) -> None:
        items = self._since_mark()
        self.stack[-1].extend(items)

    def _setitem(self) -> None:
        self.marks.append(len(self.stack) - 2)
        self._setitems()

    def _setitems(self) -> None:
        items = self._since_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            # To hash tuples of tuples may take for ever.
            if not isinstance(key, (str, _Object)):
                raise ValueError(f"a {type(key).__name__} as a key")
            self.stack[-1][key] = value

    def _stack_global(self) -> None:
        name = self.stack.pop()
        known = _text(self.stack.pop()), _text(name)
        dtype = getattr(torch, name, None) if known[0] == "torch" else None
        if not isinstance(dtype, torch.dtype) and known not in OBJECTS | CALLS:
            raise ValueError(f"the name {'.'.join(known)[:60]}, which no state needs")
        self.stack.append(dtype if isinstance(dtype, torch.dtype) else _Global(known))

    def _newobj(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        if not isinstance(made, _Global) or made.name not in OBJECTS or arguments:
            raise ValueError("an object that no state needs")
        self.stack.append(_Object(made.name[1]))

    def _reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, _Global) or called.name not in CALLS:
            raise ValueError("a call that no state needs")
        # Nothing is called: a size stands for its tuple, and of the others nothing is ever read.
        self.stack.append(arguments[0] if called.name == ("torch", "Size") else None)

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Object):
            raise ValueError("a state of no object")
        self.stack[-1].state = state


class _Global:
    def __init__(self, name: tuple[str, str]):
        self.name = name
