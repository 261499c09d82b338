"""A model and the files of its weights: strict, one tensor at a time, in the wanted dtype and on the wanted device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError
from wan.checkpoints.weights import WeightFiles

# Types whose numbers mean what they say. Float8 is widened, and scaled, by `ScaledFile` before it comes here.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Component:
    """A model on the meta device and the files that hold its tensors; made only if these fit, before data is read.

    names: tensor name in the files -> name in the model, all of them
    float32: modules or parameters by name that stay in float32 whatever the dtype
    Raises `CheckpointError` naming the first tensor that is missing, extra or of another shape.
    """

    model: nn.Module
    weights: WeightFiles
    names: Mapping[str, str]
    float32: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expected = self.model.state_dict()
        check_names(self.weights, {name: tuple(expected[own].shape) for name, own in self.names.items()})

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory that the weights take in a dtype, what stays in float32 counted as that."""
        kept = (math.prod(self.weights.shapes[name]) for name, own in self.names.items() if self._is_kept(own))
        return self.weights.bytes(dtype) + sum(kept) * (torch.float32.itemsize - dtype.itemsize)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors as they are stored, by their names in the model, one at a time."""
        for name, tensor in self.weights:
            if tensor.dtype not in DTYPES:
                where, read = self.weights.where, "only float32, bfloat16 or float16 is read"
                raise CheckpointError(f"{where}: tensor {name!r} is {tensor.dtype}; {read}")
            yield self.names[name], tensor

    def load(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        shard: Callable[[nn.Module], None] | None = None,
        change: Callable[[str, Tensor], Tensor] | None = None,
        quantize: Callable[[str, Tensor], Tensor] | None = None,
    ) -> nn.Module:
        """Read the weights into the model; needs no more memory than the result and one tensor.

        shard: spreads the parameters of the model, on the meta device still, over processes; each reads its own parts
        change: from a tensor as it is stored, and its name in the model, to the one to use
        quantize: from that one in its final type to the one that the model gets, see `wan.quantize.quantizer`
        """
        if shard is not None:
            # A model in which gradients are wanted could not be sharded: FSDP then takes parameters of one type alone.
            # FSDP keeps the types that it finds, so that parameters need theirs before.
            for name, parameter in self.model.requires_grad_(False).named_parameters():
                parameter.data = parameter.to(self._dtype_of(name, dtype))
            shard(self.model)
        # Listed after sharding, which replaces the parameters by DTensors.
        sharded = dict(self.model.named_parameters())
        state = {}
        for own, tensor in self.tensors():
            # LoRA is merged before rows are cut, since its factors make a whole tensor, and before the cast, so that
            # the sum is rounded once.
            tensor = tensor if change is None else change(own, tensor)
            whole = sharded.get(own)
            if isinstance(whole, DTensor):
                tensor = _own_rows(tensor, whole)
            # A tensor kept as read would pin its whole file in memory.
            tensor = tensor.to(device=device, dtype=self._dtype_of(own, dtype), copy=True)
            if isinstance(whole, DTensor):
                # The shape is given because torch would take that of the whole for a multiple of this part's; with
                # `run_check` it would ask the other processes.
                form = {"shape": whole.shape, "stride": whole.stride()}
                tensor = DTensor.from_local(tensor, whole.device_mesh, whole.placements, run_check=False, **form)
            state[own] = tensor if quantize is None else quantize(own, tensor)
        # Assigned, since parameters on the meta device have no memory to copy to. All names were checked when this was
        # made, so that what is missing is the second name of a tied tensor and nothing else.
        missing, _ = self.model.load_state_dict(state, strict=False, assign=True)
        if missing:
            tie_weights: Any = self.model.tie_weights
            tie_weights()
        return self.model.requires_grad_(False).eval()

    def _dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self._is_kept(name) else dtype

    def _is_kept(self, name: str) -> bool:
        return bool(set(name.split(".")) & set(self.float32))


def _own_rows(tensor: Tensor, whole: DTensor) -> Tensor:
    """The rows of a tensor that this process holds of `whole`, which is sharded by rows as torch.chunk cuts them."""
    # The last processes may have fewer rows, or none; slicing beyond the end gives just that.
    rows = -(-len(tensor) // whole.device_mesh.size())
    first = rows * whole.device_mesh.get_local_rank()
    return tensor[first : first + rows]


def check_names(weights: WeightFiles, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` unless the files hold exactly the expected tensors."""
    where = weights.where
    missing, extra = sorted(expected.keys() - weights.shapes.keys()), sorted(weights.shapes.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{where}: tensor {missing[0]!r} is missing{_more(missing)}; download it again")
    if extra:
        raise CheckpointError(f"{where}: tensor {extra[0]!r} does not belong to this model{_more(extra)}")
    for name, shape in expected.items():
        if 0 in shape:
            raise CheckpointError(f"{where}: tensor {name!r} is {shape}, which holds nothing; download it again")
        if weights.shapes[name] != shape:
            raise CheckpointError(f"{where}: tensor {name!r} is {weights.shapes[name]}, but must be {shape}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@contextmanager
def fitting(kind: str, weights: WeightFiles) -> Iterator[None]:
    """Turn whatever a model of a kind raises for a configuration that makes no sense into one clear line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{weights.where}: its configuration does not fit {kind}: {reason}") from error
