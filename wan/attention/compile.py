"""Compiling a transformer's blocks, and whether torch can compile here, found out before weights are loaded."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from nabla import InputError

# A compile for every size of video, dense and sparse; the default limit of 8 ends a long-lived process in an error.
many_compiles = partial(torch._dynamo.config.patch, recompile_limit=256, accumulated_recompile_limit=4096)
COMPILE_OPTIONS: dict[str, Any] = {
    # Measured on Hopper: takes seconds, and norms and float8 conversions are else at a fraction of the bandwidth.
    "coordinate_descent_tuning": True,
    # What processes exchange is to be sent as soon as it is there. The order that saves memory may wait for it at
    # once, and copies that have no more in common than a list of indices would wait for each other.
    "reorder_for_peak_memory": False,
    "score_fusion_memory_threshold": 2**22,
}


def compile_blocks(blocks: Iterable[nn.Module], trains: bool = False) -> None:
    """Compile a transformer's blocks, in place: one graph for all of them, whatever the step, prompt and threshold.

    With `mask_refresh` there is a second one, for the steps that take the blocks of others.
    Before any hook is put on them, which then stays outside the graph.
    trains: whether backwards are compiled as well, whose tuning takes minutes; then nothing is tuned
    """
    options = COMPILE_OPTIONS | ({"coordinate_descent_tuning": False} if trains else {})
    # The method, not the module, whose parameters would have other names, and whose class hooks would not know.
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, options=options)


def check_compiler(device: torch.device) -> None:
    """Raise `InputError` unless there is what torch compiles blocks with: a C++ compiler for a CPU, Triton and its C
    compiler for a GPU. Without it torch itself says so only when it meets the first block, with a traceback.
    """
    missing = _missing_for_gpu() if device.type == "cuda" else _missing_for_cpu()
    if missing is not None:
        raise InputError(f"compile true needs {missing}; or set compile false, which is slower")


def _missing_for_cpu() -> str | None:
    # Imported here: it takes a while, and what runs without compiling has no need of it.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError, RuntimeError):
        named = f" (CXX is {os.environ['CXX']!r})" if "CXX" in os.environ else ""
        return f"a C++ compiler, and none can be run here{named}: install g++, or name one by CXX"
    return None


def _missing_for_gpu() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton, which is not installed: pip install triton"
    # In the order in which Triton looks for one.
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named else ["gcc", "clang"])):
        named = f" (CC is {named!r})" if named else ""
        return f"a C compiler for triton, and none is found here{named}: install gcc, or name one by CC"
    return None
