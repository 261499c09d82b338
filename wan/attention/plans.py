"""Plans of an attention by what they depend on, each made on first use."""

from __future__ import annotations

import torch

import nabla
from nabla import NablaConfig, Plan


class Plans:
    """The plans of a transformer with heads of one size."""

    def __init__(self, head_size: int):
        self.head_size = head_size
        # Never forgotten: a plan is small beside a forward, and masks are kept for one by its identity.
        self.by_size: dict[tuple, Plan] = {}

    def of(
        self,
        config: NablaConfig,
        grid: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        trains: bool = False,
    ) -> Plan:
        """The plan of a config for a grid of (frames, rows, columns) tokens: layers of equal configs share it.

        trains: whether gradients will be taken
        """
        key = config, grid, device, dtype, trains
        if key not in self.by_size:
            self.by_size[key] = nabla.plan(grid, config, device, dtype, self.head_size, trains)
        return self.by_size[key]
