"""Tensor names of the published layout for the modules of diffusers and transformers.

Each rule maps a piece of a library's name to the published one; the inverse follows from listing a model's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

from wan.checkpoints.naming import TransformerNaming
from wan.models.wan.geometry import GEOMETRY

Rule = tuple[str, str]

# Rules are applied in turn, each to what those before have made of a name, so that their order matters.
TRANSFORMER: tuple[Rule, ...] = (
    # The published modules are Sequentials, in which activations have numbers too: linear, activation, linear.
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    # Activation, linear.
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    # Of a picture: LayerNorm, linear, GELU, linear, LayerNorm. Before the rule for the `norm2` of blocks.
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
    (r"^(vace_blocks\.\d+)\.proj_in\.", r"\1.before_proj."),
    (r"^(vace_blocks\.\d+)\.proj_out\.", r"\1.after_proj."),
    # That of the output, before those of the blocks, whose names end likewise.
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.to_out\.0\.", ".o."),
    # The one before cross-attention, which alone has weights; the published program counts it last.
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)

TEXT_ENCODER: tuple[Rule, ...] = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)


def published(name: str, rules: Iterable[Rule]) -> str:
    """The published name of a library's tensor."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


_USE = "use one made for the kind of Wan that the checkpoint is"
NAMING = TransformerNaming(
    family="Wan",
    to_published=partial(published, rules=TRANSFORMER),
    patch_embedding="patch_embedding",
    patch=GEOMETRY.patch,
    lora_kinds=(
        *((f"{kind}_transformer_blocks", "a LoRA of Kandinsky-5", _USE) for kind in ("visual", "text")),
        ("transformer_2.", "a LoRA of both of Wan2.2's experts", "use a file for each, as high:FILE and low:FILE"),
        ("vace", "a LoRA of a VACE model", _USE),
        *(
            (piece, "a LoRA of image-to-video", _USE)
            for piece in ("k_img", "v_img", "img_emb", "add_k_proj", "add_v_proj", "image_embedder", "norm_added")
        ),
    ),
    lora_remedy="use a LoRA made for a Wan of this kind and size",
)
