"""NABLA: block-sparse attention over video tokens, its blocks chosen from the content of each head."""

from nabla.attention import Plan, attend, attention, plan, select_blocks
from nabla.config import InputError, NablaConfig

__all__ = ["InputError", "NablaConfig", "Plan", "attend", "attention", "plan", "select_blocks"]
