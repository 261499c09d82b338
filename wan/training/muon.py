"""Muon, an optimizer that learns convolutions in far fewer steps than AdamW does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# The published ones, also torch's: of a polynomial that brings singular values near 1, and how often it is applied.
COEFFICIENTS, ITERATIONS, LEAST_NORM = (3.4445, -4.775, 2.0315), 5, 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (https://kellerjordan.github.io/posts/muon), without weight decay.

    Each weight (out, ...) counts as a matrix (out, rest). As `torch.optim.Muon`, which takes nothing but matrices and
    one after the other; here those with equal shorter sides are done at once, in a tenth of the kernels.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_side: dict[int, list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_side[min(weight.shape[0], weight[0].numel())].append(weight)
            for weights in by_side.values():
                self._update(weights, **{key: group[key] for key in ("lr", "momentum")})

    def _update(self, weights: list[nn.Parameter], lr: float, momentum: float) -> None:
        """A step of weights whose matrices have equal shorter sides."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        gradients, averages = [w.grad for w in weights], [self.state[w]["momentum"] for w in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = [step.flatten(1) for step in torch._foreach_lerp(gradients, averages, momentum)]
        tall = [step if len(step) > step.shape[1] else step.T for step in ahead]
        # Rows of zeros change nothing.
        steps = orthogonal(nn.utils.rnn.pad_sequence(tall, batch_first=True))
        for weight, (rows, columns), step in zip(weights, (matrix.shape for matrix in ahead), steps):
            step = step[: max(rows, columns)]
            step = (step if rows > columns else step.T).reshape(weight.shape)
            weight.add_(step, alpha=-lr * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearly orthogonal matrices nearest to tall ones (B, rows, columns), by Newton and Schulz, in bfloat16."""
    x = matrices.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x
