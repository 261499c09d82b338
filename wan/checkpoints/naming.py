"""What a family calls the tensors of its transformer, for files from anyone: single files of weights, and LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# What programs that pass files around put before every name.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")


@dataclass(frozen=True)
class TransformerNaming:
    """Of one family.

    family: as messages say it
    to_published: the published name of a tensor, from that one or from the name in the library's model
    patch_embedding: the layer, by its published name, that makes tokens of latents; all files have it
    patch: (frames, rows, columns) of latents to a token
    lora_kinds: pieces of the names of layers that only other models have, what a LoRA with them is of, and what helps
    lora_remedy: what helps with a LoRA of which nothing is known
    """

    family: str
    to_published: Callable[[str], str]
    patch_embedding: str
    patch: tuple[int, int, int]
    lora_kinds: tuple[tuple[str, str, str], ...]
    lora_remedy: str

    @property
    def first_weight(self) -> str:
        """The tensor without which no file is a transformer of the family."""
        return f"{self.patch_embedding}.weight"

    def published_of(self, name: str) -> str:
        """The published name of a tensor that a single file calls this."""
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        return self.to_published(name)
