"""Wan2.1 text-to-video generation with block-sparse attention, as a small patch around diffusers' classes."""

import sys

try:
    import transformers  # noqa: F401, I001  before diffusers, which else prints about a circular import

    from wan.attention import apply_attention, remove_attention
    from wan.checkpoint import Checkpoint
    from wan.observer import Observer
    from wan.pipeline import WanT2V
    from wan.recorder import Recorder
    from wan.weights import CheckpointError
except Exception:
    # The doctor is there to say what is missing or broken, and what is broken may raise anything.
    if sys.orig_argv[1:3] != ["-m", "wan.doctor"]:
        raise

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Observer",
    "Recorder",
    "WanT2V",
    "apply_attention",
    "remove_attention",
]
