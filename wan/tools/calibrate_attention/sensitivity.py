"""How much one layer at a share of its blocks, all others dense, changes its own output and the transformer's.

Of the whole transformer that is measured exactly by a forward that begins with the layer, for on what comes before it
nothing changes. Where that takes too long, the error at the layer's own output is measured for every share in the dense
forward itself, and carried to the transformer's output by a gain that one share tells: output's error over the layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wan.tools.calibrate_attention.seats import Kept, Role, Seats, groups_that_fit

# A forward once more, of the same inputs: the velocity.
Rerun = Callable[[], Tensor]


@dataclass(frozen=True)
class LayerErrors:
    """Relative squared errors of a layer at each share.

    own: of what the block gives; output: of the velocity, None where it was not measured
    """

    layer: int
    own: tuple[float, ...]
    output: tuple[float | None, ...]


def relative_square(values: Tensor, exact: Tensor) -> Tensor:
    """||values - exact||^2 / ||exact||^2 of each of a batch, and their mean: 0-d, float32."""
    change, size = (_norms(one) for one in (values - exact, exact))
    return (change / size.clamp_min(torch.finfo(torch.float32).tiny)).square().mean()


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float32)


def _own_error(output: Any, exact: Any) -> Tensor:
    """Of a block's output, which may be of several tensors: the mean over them."""
    pairs = zip(output, exact) if isinstance(output, tuple) else [(output, exact)]
    return torch.stack([relative_square(*pair) for pair in pairs]).mean()


@torch.no_grad()
def measure_layers(
    seats: Seats,
    shares: Sequence[float],
    forward: Rerun,
    layers: Sequence[int],
    whole: Collection[float],
    nbytes: int,
    found: Callable[[LayerErrors], None],
) -> Tensor:
    """Measure the errors of layers in one forward, whose velocity with all layers dense is returned.

    whole: the shares at which the error of the velocity is measured; nbytes: of a block's output
    found: is given each layer's as soon as they are known
    """
    own: dict[int, list[Tensor]] = {}
    device = next(seats.transformer.parameters()).device
    groups = groups_that_fit(layers, nbytes, device) if whole else [list(layers)]
    for group in groups:
        kept = Kept(seats, group if whole else ())
        roles = {n: _keeping(n, kept) for n in range(len(seats.seats))}
        # In the first of the dense forwards, of which there are more only where host memory is small.
        roles |= {n: _watching(n, seats, kept, shares, own) for n in (layers if not own else ())}
        with seats.roles(roles):
            exact = forward()
        for layer in group:
            output = [_whole_error(seats, kept, layer, one, forward, exact) if one in whole else None for one in shares]
            found(LayerErrors(layer, tuple(one.item() for one in own[layer]), tuple(output)))
    return exact


def _whole_error(seats: Seats, kept: Kept, layer: int, share: float, forward: Rerun, exact: Tensor) -> float:
    with seats.roles(kept.roles(layer)), seats.keeping(seats.only(layer, share)):
        return relative_square(forward(), exact).item()


def _keeping(layer: int, kept: Kept) -> Role:
    def run(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        output = block(*args, **kwargs)
        kept.put(layer, output)
        return output

    return run


def _watching(layer: int, seats: Seats, kept: Kept, shares: Sequence[float], own: dict[int, list[Tensor]]) -> Role:
    """Runs a block as it is, then at each share on the same input."""

    def run(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        exact, errors = block(*args, **kwargs), []
        for share in shares:
            seats.set(layer, share)
            errors.append(_own_error(block(*args, **kwargs), exact))
        seats.set(layer, 1)
        own[layer] = errors
        kept.put(layer, exact)
        return exact

    return run
