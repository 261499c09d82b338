"""NABLA: block-sparse attention over video tokens, its blocks chosen from the content of each head."""

from nabla.attention import Plan, attend, attention, plan, select_blocks
from nabla.checks import InputError
from nabla.config import NablaConfig
from nabla.profile import KeepProfile, Stretch

__all__ = [
    "InputError",
    "KeepProfile",
    "NablaConfig",
    "Plan",
    "Stretch",
    "attend",
    "attention",
    "plan",
    "select_blocks",
]
