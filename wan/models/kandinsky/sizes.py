"""A transformer's configuration, read off the shapes of its tensors; imports no library of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wan.checkpoints.config_checks import divides, numbers, positive
from wan.models.kandinsky.geometry import GEOMETRY

Shapes = Mapping[str, tuple[int, ...]]
# A tensor that every transformer of this family has, and no other model.
FIRST_LAYER = "visual_transformer_blocks.0.self_attention.query_norm.weight"
# The published models divide a head's channels among frames, rows and columns by quarters and three eighths, in pairs.
HEAD_MULTIPLE = 16


def transformer_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of diffusers' transformer that has tensors of these shapes."""
    head = positive("query_norm", _shape(shapes, FIRST_LAYER, 1)[0])
    divides("16", HEAD_MULTIPLE, "the size of a head", head)
    width, text = _shape(shapes, "text_embeddings.in_layer.weight", 2)
    time, pooled = _shape(shapes, "pooled_text_embeddings.in_layer.weight", 2)
    patch = GEOMETRY.patch[0] * GEOMETRY.patch[1] * GEOMETRY.patch[2]
    seen = _shape(shapes, "visual_embeddings.in_layer.weight", 2)[1]
    made = _shape(shapes, "out_layer.out_layer.weight", 2)[0]
    divides("a patch", patch, "visual_embeddings.in_layer", seen)
    divides("a patch", patch, "out_layer.out_layer", made)
    seen, made = seen // patch, made // patch
    # Latents, as many of a given picture, and a mask.
    conditioned = 2 * made + 1
    if seen not in (made, conditioned):
        raise ValueError(f"it sees {seen} channels and makes {made}, but must see {made} or {conditioned}")
    divides("the size of a head", head, "model_dim", positive("model_dim", width))
    return {
        "in_visual_dim": positive("out_visual_dim", made),
        "out_visual_dim": made,
        "in_text_dim": positive("in_text_dim", text),
        "in_text_dim2": positive("in_text_dim2", pooled),
        "time_dim": positive("time_dim", time),
        "patch_size": list(GEOMETRY.patch),
        "model_dim": width,
        "ff_dim": positive("ff_dim", _shape(shapes, "visual_transformer_blocks.0.feed_forward.in_layer.weight", 2)[0]),
        "num_text_blocks": numbers(shapes, "text_transformer_blocks."),
        "num_visual_blocks": numbers(shapes, "visual_transformer_blocks."),
        "axes_dims": [head // 4, 3 * head // 8, 3 * head // 8],
        "visual_cond": seen == conditioned,
    }


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != axes:
        raise ValueError(f"tensor {name!r} is {'missing' if shape is None else shape}, but must have {axes} axes")
    return shape
