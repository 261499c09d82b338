"""Sentences and what they say: captions of the data set for training, sentences of people from a file for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerFast

from nabla import InputError
from wan.config.prompts import clean_prompt
from wan.files.plain_data import read_yaml
from wan.shapes.attributes import ATTRIBUTES, attributes, numbers, said
from wan.shapes.captions import caption
from wan.shapes.dataset import Shapes
from wan.shapes.roughen import roughened, unrelated
from wan.shapes.scenes import chance
from wan.shapes.variants import variant

# More than any run takes.
ENDLESS = 2**62
ROUGH_SHARE, UNRELATED_SHARE = 0.6, 0.02


class CaptionBatch(NamedTuple):
    """Token ids and mask, (B, L) int64 each, and classes of all attributes, (B, len(ATTRIBUTES)) int64."""

    ids: Tensor
    mask: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> CaptionBatch:
        return CaptionBatch(*(part.to(device) for part in self))


class Sentences(Dataset):
    """Item `step` is the batch of that step: a pure function of it and the seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int):
        self.tokenizer, self.seed, self.batch_size = tokenizer, seed, batch_size
        self.shapes = Shapes(seed, ENDLESS)

    def __getitem__(self, step: int) -> CaptionBatch:
        first = step * self.batch_size
        texts, targets = zip(*(self.described(first + place) for place in range(self.batch_size)))
        return encoded(self.tokenizer, texts, torch.stack(targets))

    def described(self, index: int) -> tuple[str, Tensor]:
        """A caption, often rougher than the data set has it, and its classes; now and then a text without any."""
        rng = np.random.default_rng((self.seed, index))
        # All classes are 0, "not said".
        if chance(rng, UNRELATED_SHARE):
            return unrelated(rng), torch.zeros(len(ATTRIBUTES), dtype=torch.int64)
        # The data set's own sentence is left: a variant needs another one.
        scene = variant(self.shapes.described(index)[0], rng)
        text = caption(scene, rng)
        return roughened(text, rng) if chance(rng, ROUGH_SHARE) else text, attributes(scene)


def encoded(tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...] | list[str], targets: Tensor) -> CaptionBatch:
    """A batch whose rows are as long as the longest of its sentences."""
    tokens: BatchEncoding = tokenizer(
        [clean_prompt(text) for text in texts], padding=True, truncation=True, return_tensors="pt"
    )
    return CaptionBatch(tokens.input_ids, tokens.attention_mask, targets)


def of_shapes(count: int, seed: int, split: str = "held_out") -> list[tuple[str, dict[str, str]]]:
    """Captions and what they say, as `attributes.said` gives it; "held_out" ones are of scenes training never sees."""
    described = map(Shapes(seed, count, split=split).described, range(count))
    return [(text, said(scene)) for scene, text in described]


def with_classes(sentences: Sequence[tuple[str, Mapping[str, str]]]) -> tuple[list[str], Tensor]:
    """Sentences and their classes, of sentences and what they say."""
    texts, named = zip(*sentences)
    return list(texts), torch.stack(list(map(numbers, named)))


def read_sentences(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Sentences and what they say, as `attributes.said` gives it, of such a list as tests/data/shapes_sentences.yaml.

    Each item has `text`, `shapes` (a list of mappings from attributes of a shape to classes), and, where the text says
    so, `background` (the same for the background) and `relation`. Raises `InputError` for what is not of this form.
    """
    try:
        read = [(item["text"], _named(item)) for item in read_yaml(path)]
        for _, named in read:
            numbers(named)
        return read
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise InputError(f"sentences {path} cannot be read ({reason}); see tests/data/shapes_sentences.yaml") from None


def _named(item: Mapping[str, Any]) -> dict[str, str]:
    named = {"shapes": str(len(item["shapes"]))} if item["shapes"] else {}
    for slot, shape in enumerate(item["shapes"], start=1):
        named |= {f"shape {slot} {name}": value for name, value in shape.items()}
    named |= {f"background {name}": value for name, value in item.get("background", {}).items()}
    return named | ({"relation": item["relation"]} if "relation" in item else {})
