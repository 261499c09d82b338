"""The model families, in the order in which a checkpoint is shown to them. A new one is a line here."""

from __future__ import annotations

from wan.models.family import Family
from wan.models.kandinsky.family import KANDINSKY
from wan.models.wan.family import WAN

FAMILIES: tuple[Family, ...] = (WAN, KANDINSKY)
# That of files which were written before they named any.
FIRST_FAMILY = WAN
