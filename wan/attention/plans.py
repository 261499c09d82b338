"""Plans of an attention by what they depend on, each made on first use."""

from __future__ import annotations

import torch

import nabla
from nabla import NablaConfig, Plan


class Plans:
    """The plans of a transformer with heads of one size."""

    def __init__(self, config: NablaConfig, head_size: int):
        self.config, self.head_size = config, head_size
        # Never forgotten: a plan is small beside a forward, and masks are kept for one by its identity.
        self.by_size: dict[tuple, Plan] = {}

    def of(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        dense: bool = False,
        trains: bool = False,
    ) -> Plan:
        """The plan for a grid of (frames, rows, columns) tokens, or a dense one for it.

        trains: whether gradients will be taken
        """
        key = grid, device, dtype, dense, trains
        if key not in self.by_size:
            config = NablaConfig() if dense else self.config
            self.by_size[key] = nabla.plan(grid, config, device, dtype, self.head_size, trains)
        return self.by_size[key]
