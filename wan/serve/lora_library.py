"""A folder of LoRA files, of the operator and of users. Files of users are data."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError
from wan.checkpoints.tensor_files import weight_file
from wan.checkpoints.weights import WeightFiles
from wan.files.atomic import atomic_path
from wan.files.formats import SAFETENSORS
from wan.files.hashes import file_hash
from wan.files.video import make_folder


class LoraLibrary:
    """A folder of LoRA files: those of who runs the page, and those that users add, named by what they hold.

    It is made if it is not there; raises `InputError` if that cannot be.
    """

    def __init__(self, folder: Path):
        make_folder(folder, "lora_dir")
        self.folder = folder

    def files(self) -> dict[str, str]:
        """Paths by name."""
        return {path.name: str(path.resolve()) for path in sorted(self.folder.glob(f"*{SAFETENSORS}"))}

    def added_bytes(self) -> int:
        """What the files that were added hold on the disk; they end in a digest."""
        added = re.compile(rf".*-[0-9a-f]{{8}}{re.escape(SAFETENSORS)}")
        return sum(path.lstat().st_size for path in self.folder.iterdir() if added.fullmatch(path.name))

    def add(self, upload: Path) -> str:
        """Take in a copy of an uploaded file, and give its name.

        Raises `InputError` unless it is safetensors, of which only names and shapes are read, and if it cannot be kept;
        whether it fits a transformer is checked when it is used.
        """
        path = weight_file("lora", upload, (SAFETENSORS,))
        try:
            WeightFiles([path])
        except CheckpointError as error:
            # Visitors see the file's name, not the server's temporary folder.
            raise InputError(str(error).replace(str(path), path.name)) from None
        digest = file_hash(path)[:8]
        stem = re.sub(r"[^\w.-]+", "-", path.stem).strip("-.")[:60] or "lora"
        # A file that comes twice is one by its digest, which one that was taken from this folder has already.
        name = f"{stem.removesuffix('-' + digest)}-{digest}{SAFETENSORS}"
        try:
            with atomic_path(self.folder / name) as partial:
                shutil.copyfile(path, partial)
        except (OSError, InputError) as error:
            # `atomic_path` names the server's folder.
            reason = getattr(error.__cause__ or error, "strerror", None) or "it cannot be written"
            raise InputError(f"{path.name} cannot be kept ({reason}); see --lora_dir") from error
        return name
