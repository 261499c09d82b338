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
    one after the other; here those of a shape are done at once, in a tenth of the kernels.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape[0], weight[0].numel()].append(weight)
            for (rows, columns), weights in by_shape.items():
                steps = orthogonal(self._with_momentum(weights, group["momentum"]))
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for weight, step in zip(weights, steps):
                    weight.add_(step.view(weight.shape), alpha=-rate)

    def _with_momentum(self, weights: list[nn.Parameter], momentum: float) -> Tensor:
        """Gradients with Nesterov's momentum, (weights, rows, columns)."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        gradients, averages = [w.grad for w in weights], [self.state[w]["momentum"] for w in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, averages, momentum)
        return torch.stack([each.flatten(1) for each in ahead])


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearly orthogonal matrices nearest to each of (..., rows, columns), by Newton and Schulz, in bfloat16."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
