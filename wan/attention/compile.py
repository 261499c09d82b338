"""Whether torch can compile here, found out before weights are loaded."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from nabla import InputError


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
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named else ["gcc", "clang"])):
        named = f" (CC is {named!r})" if named else ""
        return f"a C compiler for triton, and none is found here{named}: install gcc, or name one by CC"
    return None
