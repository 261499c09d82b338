"""Settings of scripts/prepare_data.py, strict like those of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from wan.config.checks import check_text
from wan.config.model_settings import COMPONENTS, DTYPES
from wan.training.config import PRECISIONS
from wan.training.schema import (
    ComponentPlaces,
    check_choice,
    check_counts,
    check_flags,
    check_mapping,
    check_texts,
    from_mapping,
    to_plain,
)


@dataclass(frozen=True)
class PrepareSettings(ComponentPlaces):
    """What `prepare_data.py` makes: latents and text states of a dataset, in shards.

    checkpoint: whose VAE, text encoder and tokenizer to use; it needs no transformer
    dataset: a name in `wan.tools.datasets.DATASETS`; options: what that one takes
    dropped_text: what a clip without its text says; batch: clips encoded at once; workers: reading processes
    dtype: of what is stored; vae_dtype: of the VAE's encoder, much faster on a GPU in float16, which may overflow
    whole_clips: encode in one pass rather than by chunks of four frames, faster with more memory
    """

    checkpoint: str
    out: str
    dataset: str = "videos"
    options: dict[str, Any] = field(default_factory=dict)
    clips_per_shard: int = 64
    batch: int = 1
    workers: int = 0
    dtype: str = "bfloat16"
    vae_dtype: str = "float32"
    whole_clips: bool = False
    dropped_text: str = ""

    def __post_init__(self) -> None:
        check_texts(self, "checkpoint", "out", "dataset", *self.components)
        check_flags(self, "whole_clips")
        check_counts(self, "clips_per_shard", "batch")
        check_counts(self, "workers", least=0)
        check_choice(self, "dtype", PRECISIONS)
        check_choice(self, "vae_dtype", DTYPES)
        check_mapping("options", self.options)
        check_text("dropped_text", self.dropped_text)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> PrepareSettings:
        return from_mapping(cls, settings, "the settings of prepare_data", {})

    def what_decides(self) -> dict[str, Any]:
        """Those of the settings that decide what stands in the shards, as plain values."""
        # Where components lie decides nothing; which they are their fingerprints tell.
        no_part = ("out", "batch", "workers", "whole_clips", *COMPONENTS)
        return to_plain({name: value for name, value in asdict(self).items() if name not in no_part})
