"""What tells the contents of files and texts apart: SHA-256, in hexadecimal digits."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_hash(path: Path) -> str:
    """Of a whole file; raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(text: str | bytes) -> str:
    """Of a text in UTF-8, or of bytes as they are."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()
