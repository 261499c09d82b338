"""What files from anyone call the tensors of Kandinsky-5's transformer: the same names in every layout."""

from __future__ import annotations

from wan.checkpoints.naming import TransformerNaming
from wan.models.kandinsky.geometry import GEOMETRY

NAMING = TransformerNaming(
    family="Kandinsky-5",
    to_published=str,
    patch_embedding="visual_embeddings.in_layer",
    patch=GEOMETRY.patch,
    lora_kinds=(),
    lora_remedy="use a LoRA made for Kandinsky-5 of this size",
)
