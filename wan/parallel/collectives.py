"""What processes tell each other in one call."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all processes of a group, stacked: (...) -> (processes, ...). All have to be of one shape."""
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(gathered), x.contiguous(), group)
    return gathered


def gather_guidance(prediction: Tensor, mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """The predictions of both guidance branches, each process having made its own; the same on both."""
    return all_gather(prediction, mesh.get_group()).unbind()
