"""Muon, an optimizer of matrices, which learns convolutions in far fewer steps than AdamW does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# The published ones, also torch's: of a polynomial that brings singular values near 1, and how often it is applied.
COEFFICIENTS, ITERATIONS, LEAST_NORM = (3.4445, -4.775, 2.0315), 5, 1e-7
# Elements of the matrices that are done at once; a step needs about 1 GiB beside gradients and momentum.
STACKED = 2**26


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (https://kellerjordan.github.io/posts/muon).

    Each weight (out, ...) counts as a matrix (out, rest). As `torch.optim.Muon`, which takes nothing but matrices and
    one after the other; here those with equal shorter sides are done at once, in a tenth of the kernels.

    weight_decay: share of a weight, times the learning rate, that each step takes away
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """closure: there for torch's functions that save and load optimizers, which name it"""
        for group in self.param_groups:
            # States saved before there was a decay do not name it.
            settings = group["lr"], group["momentum"], group.get("weight_decay", 0.0)
            for weights in stacks([weight for weight in group["params"] if weight.grad is not None]):
                self._update(weights, *settings)

    def _update(self, weights: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        """A step of weights whose matrices have equal shorter sides."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        gradients, averages = [w.grad for w in weights], [self.state[w]["momentum"] for w in weights]
        # The average takes 1 - momentum of the gradient. The step is Nesterov's: momentum of the new average, and of
        # the gradient the rest.
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = [step.flatten(1) for step in torch._foreach_lerp(gradients, averages, momentum)]
        # (longer side, shorter side), so that the products in `orthogonal` are of the shorter side.
        tall = [step if len(step) > step.shape[1] else step.T for step in ahead]
        # Apart from the gradient, as in AdamW.
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        # Rows of zeros change nothing.
        steps = orthogonal(nn.utils.rnn.pad_sequence(tall, batch_first=True))
        for weight, (rows, columns), step in zip(weights, (matrix.shape for matrix in ahead), steps):
            step = step[: max(rows, columns)]
            step = (step if rows > columns else step.T).reshape(weight.shape)
            # The published factor for weights with more outputs than inputs.
            weight.add_(step, alpha=-lr * max(1.0, rows / columns) ** 0.5)


def stacks(weights: Iterable[nn.Parameter], elements: int = STACKED) -> list[list[nn.Parameter]]:
    """Weights whose matrices have equal shorter sides, in groups that fill at most so many elements once padded.

    A larger matrix is a group of its own.
    """
    by_side: dict[int, list[nn.Parameter]] = defaultdict(list)
    # Those of one length together, which need no padding.
    for weight in sorted(weights, key=_longer_side):
        by_side[weight.numel() // _longer_side(weight)].append(weight)
    groups: list[list[nn.Parameter]] = []
    for side, alike in by_side.items():
        groups.append([])
        for weight in alike:
            if groups[-1] and (len(groups[-1]) + 1) * _longer_side(weight) * side > elements:
                groups.append([])
            groups[-1].append(weight)
    return groups


def _longer_side(weight: Tensor) -> int:
    return max(weight.shape[0], weight[0].numel())


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearly orthogonal matrices nearest to tall ones (B, rows, columns), by Newton and Schulz.

    In bfloat16 on a GPU, as is usual; CPUs are a hundred times slower at that than in float32.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    # The Frobenius norm is at least the largest singular value, and up to 1 the polynomial brings values near 1.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        # (B, columns, columns). On each singular value s: a s + b s^3 + c s^5.
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x
