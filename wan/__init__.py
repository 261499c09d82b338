"""Video generation with block-sparse attention by Wan and Kandinsky-5, a small patch around diffusers' classes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan.checkpoints.file_errors import CheckpointError
    from wan.models.attention import apply_attention, remove_attention
    from wan.models.checkpoint import Checkpoint
    from wan.models.kandinsky.pipeline import Kandinsky5
    from wan.models.pretrained import from_pretrained
    from wan.models.wan.image_to_video import WanI2V
    from wan.models.wan.pipeline import WanT2V
    from wan.models.wan.text_image_to_video import WanTI2V
    from wan.models.wan.vace_pipeline import WanVACE
    from wan.observe.observer import Observer
    from wan.observe.recorder import Recorder

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Kandinsky5",
    "Observer",
    "Recorder",
    "WanI2V",
    "WanT2V",
    "WanTI2V",
    "WanVACE",
    "apply_attention",
    "from_pretrained",
    "remove_attention",
]
# Imported when first asked for: a program parses its flags, and minds Ctrl-C, before the seconds that torch takes.
_MODULES = {
    "Checkpoint": "models.checkpoint",
    "CheckpointError": "checkpoints.file_errors",
    "Kandinsky5": "models.kandinsky.pipeline",
    "Observer": "observe.observer",
    "Recorder": "observe.recorder",
    "WanI2V": "models.wan.image_to_video",
    "WanT2V": "models.wan.pipeline",
    "WanTI2V": "models.wan.text_image_to_video",
    "WanVACE": "models.wan.vace_pipeline",
    "apply_attention": "models.attention",
    "from_pretrained": "models.pretrained",
    "remove_attention": "models.attention",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Before diffusers, which else prints about a circular import with some versions of huggingface_hub.
    import_module("transformers")
    return getattr(import_module(f"wan.{_MODULES[name]}"), name)
