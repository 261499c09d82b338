"""LoRA of a pipeline that is loaded, exchanged without its models being loaded again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING

from wan.checkpoints.component import Component
from wan.checkpoints.lora import Adapter, merge_anew, read_lora, takes_merges
from wan.config.model_settings import EXPERTS, ModelSettings
from wan.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from wan.sampling.guided import GuidedPipeline

log = logging.getLogger("wan")


def read_adapters(checkpoint: Checkpoint, settings: ModelSettings) -> list[Adapter]:
    """The LoRA files of settings, checked against the transformer that they are for; raises as `read_lora` does."""
    if not settings.lora:
        return []
    # Experts are of one form.
    model = _component(checkpoint, settings, EXPERTS[0] if checkpoint.boundary is not None else None).model
    return [read_lora(file, model, checkpoint.family.naming) for file in settings.lora]


def exchange_lora(
    pipe: GuidedPipeline,
    checkpoint: Checkpoint,
    settings: ModelSettings,
    adapters: Sequence[Adapter],
    changed: Set[str],
) -> bool:
    """Have a pipeline that was loaded by settings but for their LoRA run with these, as if it had been loaded so.

    adapters: of the settings; changed: names of tensors that the LoRA which it has now changes
    False, with nothing changed, where it has to be loaded anew, since its weights are packed or shared out.
    """
    names = changed.union(*(adapter.changes for adapter in adapters))
    if not all(takes_merges(one, names) for one in pipe.transformers):
        log.info("lora: the weights are packed or shared out, so they are loaded anew")
        return False
    for expert, transformer in zip(_experts(pipe), pipe.transformers):
        own = [adapter for adapter in adapters if adapter.file.expert in (None, expert)]
        merge_anew(transformer, _component(checkpoint, settings, expert), own, names)
    for adapter in adapters:
        log.info("lora: %s, merged into the weights that are loaded", adapter.describe())
    pipe.lora = settings.lora
    return True


def _experts(pipe: GuidedPipeline) -> Iterator[str | None]:
    return iter(EXPERTS if len(pipe.transformers) > 1 else (None,))


def _component(checkpoint: Checkpoint, settings: ModelSettings, expert: str | None) -> Component:
    pipeline = checkpoint.family.load_pipeline(checkpoint.layout)
    file = settings.transformer_files.get(expert)
    if expert is None:
        return pipeline.transformer_component(checkpoint, file)
    return pipeline.transformer_component(checkpoint, file, expert)
