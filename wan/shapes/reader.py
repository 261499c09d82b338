"""A text encoder that reads what sentences say, with the heads by which it learns to.

Every attribute is read off the encoder's states by attention with one learned query and a linear layer, so that a
transformer's cross-attention can read it too. The heads are no part of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from wan.shapes.attributes import ATTRIBUTES
from wan.shapes.sentences import CaptionBatch
from wan.training.schema import check_counts


@dataclass(frozen=True)
class EncoderSettings:
    """Sizes of the encoder; its attention is `heads * head_size` wide."""

    width: int = 192
    layers: int = 4
    heads: int = 6
    head_size: int = 32
    ffn_width: int = 512

    def __post_init__(self) -> None:
        check_counts(self, *(item.name for item in fields(self)))


class AttributeHeads(nn.Module):
    """Reads every attribute off text states (B, L, C) by attention with one query and a linear layer."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), width) * width**-0.5)
        self.classifiers = nn.ModuleList(nn.Linear(width, len(classes)) for classes in ATTRIBUTES.values())

    def forward(self, states: Tensor, mask: Tensor) -> list[Tensor]:
        """Scores of the classes of each attribute, (B, classes) each; mask (B, L) is 0 where there is no token."""
        # (attributes, width) @ (B, width, L): a query's score of each token.
        scores = (self.queries @ states.mT).masked_fill(mask[:, None] == 0, -math.inf)
        # (B, attributes, width)
        read = scores.softmax(-1) @ states
        return [classify(read[:, number]) for number, classify in enumerate(self.classifiers)]


class Reader(nn.Module):
    """A text encoder and the heads that train it."""

    def __init__(self, sizes: EncoderSettings, vocabulary: int):
        super().__init__()
        self.encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=vocabulary,
                d_model=sizes.width,
                d_kv=sizes.head_size,
                d_ff=sizes.ffn_width,
                num_layers=sizes.layers,
                num_heads=sizes.heads,
                # Captions never come twice.
                dropout_rate=0.0,
            )
        )
        # So every state has a mean square of 1, the scale at which it enters the transformer.
        self.encoder.encoder.final_layer_norm.requires_grad_(False)
        for bias in self.position_biases():
            nn.init.normal_(bias)
        self.heads = AttributeHeads(sizes.width)

    def position_biases(self) -> list[nn.Parameter]:
        """What attention makes of distances, in units of its scores.

        Drawn and trained as small as other weights, they leave the order of words unread for thousands of steps.
        """
        return [weight for name, weight in self.named_parameters() if "relative_attention_bias" in name]

    def forward(self, batch: CaptionBatch) -> list[Tensor]:
        states = self.encoder(batch.ids, attention_mask=batch.mask).last_hidden_state
        return self.heads(states, batch.mask)

    def loss(self, batch: CaptionBatch) -> Tensor:
        """Cross-entropy, the mean over the attributes."""
        scores = self(batch)
        # In float32, whatever autocast made of the scores.
        losses = [F.cross_entropy(each.float(), batch.targets[:, number]) for number, each in enumerate(scores)]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def are_correct(self, batch: CaptionBatch) -> Tensor:
        """Whether each attribute of each sentence is read as it should be, (B, len(ATTRIBUTES)) bool."""
        return torch.stack([each.argmax(-1) for each in self(batch)], 1) == batch.targets
