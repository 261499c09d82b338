"""Making a video again from its sidecar: what may differ though the settings are the same.

A plan of memory quantises weights as much as it must, which changes the video and is no setting of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wan.config.settings import Settings
from wan.memory.planner import MemoryPlan
from wan.quantize.gguf import GGUF

# What a plan may quantise, and the keys of a sidecar that say how.
MODELS = {"transformer": "packing", "text encoder": "text_packing"}


def quantizations_of(plan: object, fp8: bool) -> dict[str, str | None]:
    """How a plan quantises each model, as a sidecar has it, or a run without one; not what its file has done."""
    own = {"packing": "fp8" if fp8 else None, "text_packing": None}
    own |= plan if isinstance(plan, dict) else {}
    # GGUF is how the file of weights came, which is a setting, and no choice of the plan.
    return {name: None if own[key] == GGUF.key else own[key] for name, key in MODELS.items()}


def quantized_otherwise(
    sidecar: str, made_with: Mapping[str, Any], settings: Settings, plan: MemoryPlan | None
) -> str | None:
    """A line if a run quantises otherwise than that of a sidecar, and what gives the same; None if it does not.

    made_with: what the sidecar says of it; empty of other files of settings
    """
    if not made_with:
        return None
    then = quantizations_of(made_with.get("plan"), settings.fp8)
    now = quantizations_of(plan and plan.to_sidecar(), settings.fp8)
    differing = [name for name in MODELS if then[name] != now[name]]
    if not differing:
        return None
    own = settings.dtype
    what = " and ".join(f"the {name} in {then[name] or own} (here {now[name] or own})" for name in differing)
    memory = made_with.get("memory")
    back = (
        f"--memory {memory} packs as there, if as much is free" if memory else "leave --memory out to have it as there"
    )
    return f"{sidecar} was made with {what}, so this video will differ; {back}"
