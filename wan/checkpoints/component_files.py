"""Where the weights of a checkpoint's components lie, in the published layout of their family and in diffusers'."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wan.checkpoints.weights import WeightFiles

# What the files of a model are named by diffusers, and by transformers.
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"


@dataclass(frozen=True)
class ComponentFiles:
    """Of one component.

    name: as diffusers' pipelines call it, and so its folder in that layout
    stem: what the names of its files begin with there
    published: its file in the published layout; or, without an ending, what the names of its safetensors begin with; or
        a folder, with / at its end, of safetensors of any name
    """

    name: str
    stem: str
    published: str

    @property
    def is_one_file(self) -> bool:
        """Whether in the published layout it is a file of a known name, and not several with an index."""
        return bool(Path(self.published).suffix)

    def find(self, folder: Path, published: bool) -> WeightFiles:
        """Its tensors in the folder of a checkpoint; raises `CheckpointError` if they are not all there."""
        if not published:
            return WeightFiles.find(folder / self.name, self.stem)
        path = folder / self.published
        if self.published.endswith("/"):
            return WeightFiles.find(path, "")
        return WeightFiles([path]) if self.is_one_file else WeightFiles.find(path.parent, path.name)
