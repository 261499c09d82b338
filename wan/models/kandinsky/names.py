"""What files from anyone call the tensors of Kandinsky-5's transformer: the same names in every layout."""

from __future__ import annotations

from wan.checkpoints.naming import TransformerNaming
from wan.models.kandinsky.geometry import GEOMETRY

_USE = "use one made for Kandinsky-5"
NAMING = TransformerNaming(
    family="Kandinsky-5",
    to_published=str,
    patch_embedding="visual_embeddings.in_layer",
    patch=GEOMETRY.patch,
    lora_kinds=(
        # First, since text encoders have layers of other models' names too.
        ("q_proj", "a LoRA of a text encoder", _USE),
        *((piece, "a LoRA of Wan", _USE) for piece in ("self_attn", "cross_attn", "attn1", "attn2", "ffn.", "ffn_")),
    ),
    lora_remedy="use a LoRA made for Kandinsky-5 of this size",
)
