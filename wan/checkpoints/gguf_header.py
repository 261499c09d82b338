"""What a GGUF file says before its data, walked through once: the library that reads it trusts every count in it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from wan.checkpoints.file_errors import CheckpointError

MAGIC = b"GGUF"
# As the library: version 1 has counts of 32 bits. The version of a big-endian file reads as none of these.
VERSIONS = (2, 3)
# Bytes of a value by its type's number: u8, i8, u16, i16, u32, i32, f32 and bool, from 10 on u64, i64 and f64.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY = 8, 9
# Bounds on what a header that lies can cost of time and memory, far above what a transformer's file has.
MAX_VALUES = 100_000
MAX_TEXT = 2**20
MAX_AXES = 8


def check_gguf(file: Path) -> None:
    """Raise `ValueError` for a header that makes no sense, `CheckpointError` for a tensor of an unknown type."""
    from gguf import GGMLQuantizationType

    with file.open("rb") as opened:
        known = {int(kind) for kind in GGMLQuantizationType}
        for name, kind in _Walk(opened, file.stat().st_size).tensors():
            if kind not in known:
                raise CheckpointError(
                    f"{file}: tensor {name!r} is of GGUF's type {kind}, which this version of gguf does not know; "
                    "use a file of Q8_0, Q6_K, Q5_K or Q4_K, or a newer gguf"
                )


class _Walk:
    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.values = 0

    def tensors(self) -> Iterator[tuple[str, int]]:
        """The name and the type of each tensor."""
        if self.file.read(4) != MAGIC:
            raise ValueError("it does not begin as GGUF does")
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, not one of {VERSIONS}")
        # Then entries of a key, a type and a value, and for each tensor its name, the number of its axes, their sizes,
        # a type, and where its data begins; counts, sizes and offsets take 8 bytes.
        tensors, entries = self.number("Q"), self.number("Q")
        for _ in range(self.counted(entries)):
            self.text()
            self.skip_value(self.number("I"))
        for _ in range(self.counted(tensors)):
            name, axes = self.text().decode(), self.number("I")
            if axes > MAX_AXES:
                raise ValueError(f"tensor {name[:60]!r} has {axes} axes")
            self.skip(8 * axes)
            yield name, self.number("I")
            self.skip(8)

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == TEXT:
            self.text()
        # Arrays of arrays could nest as deep as the file is long, past Python's limit of recursion.
        elif kind == ARRAY and depth < 4:
            inner, count = self.number("I"), self.counted(self.number("Q"))
            for _ in range(count):
                self.skip_value(inner, depth + 1)
        else:
            raise ValueError(f"a value is of type {kind}")

    def counted(self, count: int) -> int:
        # One sum for the whole header, since a bound on each count would be multiplied by nested arrays.
        self.values += count
        if self.values > MAX_VALUES:
            raise ValueError(f"its header counts {self.values} values; the most is {MAX_VALUES}")
        return count

    def text(self) -> bytes:
        length = self.number("Q")
        if length > MAX_TEXT:
            raise ValueError(f"a text of its header has {length} bytes")
        return self.read(length)

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.read(struct.calcsize(f"<{form}")))[0]

    def read(self, count: int) -> bytes:
        read = self.file.read(count)
        if len(read) < count:
            raise ValueError("it ends within its header")
        return read

    def skip(self, count: int) -> None:
        # Seeking beyond the end is no error.
        if self.file.tell() + count > self.size:
            raise ValueError("it ends within its header")
        self.file.seek(count, 1)
