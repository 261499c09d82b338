"""How well a video shows what its prompt says, by CLIP (Hessel et al. 2021, "CLIPScore")."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from wan.tools.evaluate.likeness import Unavailable, in_a_line

# Frames of a video that are looked at, evenly spread: those between differ little.
FRAMES = 8


class ClipScore:
    """100 times the cosine of a frame's and the prompt's directions, at least 0; the mean over `FRAMES` frames.

    how: which CLIP it is. A prompt is cut where CLIP's text ends, mostly after 77 tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, pictures: Any, how: str, device: torch.device):
        self.model, self.tokenizer, self.pictures = model, tokenizer, pictures
        self.how, self.device = how, device

    @torch.no_grad()
    def __call__(self, video: Tensor, prompt: str) -> float:
        """Of a uint8 video (frames, H, W, 3)."""
        length = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt")
        count = min(FRAMES, len(video))
        numbers = torch.linspace(0, len(video) - 1, count).round().long()
        pictures = self.pictures(images=list(video[numbers].cpu().numpy()), return_tensors="pt")
        given = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
        given["pixel_values"] = pictures["pixel_values"].to(self.model.dtype)
        found = self.model(**{name: value.to(self.device) for name, value in given.items()})
        directions, wanted = (_unit(one) for one in (found.image_embeds, found.text_embeds))
        return float((100 * directions @ wanted.mT).clamp(min=0).mean())


def _unit(directions: Tensor) -> Tensor:
    return torch.nn.functional.normalize(directions.float(), dim=-1)


def load_clip(where: str | None, device: torch.device) -> ClipScore:
    """transformers' CLIP of a directory or hub id; raises `Unavailable` if none is named or it cannot be had."""
    if where is None:
        raise Unavailable("no CLIP is named; give --clip openai/clip-vit-large-patch14, or its folder")
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    try:
        model = CLIPModel.from_pretrained(where).eval().to(device)
        tokenizer, pictures = AutoTokenizer.from_pretrained(where), CLIPImageProcessor.from_pretrained(where)
    # Whatever hubs, networks and damaged files bring the library to.
    except Exception as error:
        raise Unavailable(f"{where}: {in_a_line(error)}") from None
    name = os.path.basename(os.path.normpath(where)) if os.path.isdir(where) else where
    return ClipScore(model, tokenizer, pictures, f"{name}, {FRAMES} frames", device)
