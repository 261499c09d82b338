"""The memory that a computation takes, counted on the meta device, where it takes none."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counted(TorchDispatchMode):
    """Bytes of the tensors that are made within and there at once, on the meta device too, where they take none."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            # Views are of memory that is counted already.
            if isinstance(result, torch.Tensor) and (key := result.untyped_storage()._cdata) not in given:
                if key not in self.sizes:
                    self.sizes[key] = result.untyped_storage().nbytes()
                    weakref.finalize(result.untyped_storage(), self.sizes.pop, key, None)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return results
