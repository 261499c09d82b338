"""A model's parameters sharded over processes (FSDP2), from outside."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def apply_fsdp(model: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh) -> None:
    """Shard a model's parameters over a mesh of one dimension, in place, a block at a time gathered while it runs.

    The model may be on the meta device still. Its parameters must not require gradients where their dtypes differ.
    """
    # Blocks before the root, which takes what is left.
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # A root keeps what it has gathered for a backward, which there is none of.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)
