"""What the doctor found, for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from wan.tools.doctor.packages import PackageStatus

# For annotations alone: these modules need packages whose lack this one reports.
if TYPE_CHECKING:
    from wan.tools.doctor.advice import Advice
    from wan.tools.doctor.checkpoints import LocalCheckpoint
    from wan.tools.doctor.fits import MemoryFit
    from wan.tools.doctor.kernels import KernelStatus
    from wan.tools.doctor.machine import Card, Machine

WIDTH = 100


def fact_lines(facts: dict[str, Any]) -> list[str]:
    return [
        *_machine(facts["machine"]),
        *_kernels(facts["kernels"]),
        *_fits(facts["fits"]),
        *_checkpoints(facts["checkpoints"]),
    ]


def package_lines(found: tuple[PackageStatus, ...]) -> list[str]:
    needed = [(one.name, one.version or "-", one.problem or "") for one in found if one.needed]
    optional = [
        (one.name, one.version or "-", f"{one.purpose}; {one.problem}: {one.install}" if one.problem else one.purpose)
        for one in found
        if not one.needed
    ]
    faults = [row for row in needed if row[2]]
    all_of_them = textwrap.wrap(", ".join(f"{name} {version}" for name, version, _ in needed), WIDTH)
    shown = faults or [(line,) for line in all_of_them]
    return [*_section("Packages that are needed", shown), *_section("Optional packages", optional)]


def closing_lines(advice: Advice | None, broken: list[str]) -> list[str]:
    """What to run, what to install, and what is broken."""
    lines = []
    if advice is not None and not broken:
        lines += ["Run", *(f"  {command}" for command in advice.commands), f"  ({advice.why})", ""]
    if advice is not None and advice.faster:
        lines += ["Faster", *(f"  - {line}" for line in advice.faster), ""]
    lines += ["Broken", *(f"  - {line}" for line in broken)] if broken else ["Nothing that is needed is broken."]
    return lines


def _machine(here: Machine) -> list[str]:
    cards = [("card", _card(one)) for one in here.cards]
    rows = [
        *(cards or [("card", here.unseen or "none that torch sees")]),
        ("driver", here.driver or "none of NVIDIA"),
        ("torch", f"{here.torch}, " + (f"for CUDA {here.cuda}" if here.cuda else "without CUDA")),
        ("Python", here.python),
        ("host", f"{here.cores} cores, {here.host_gib:.1f} GiB, {here.free_host_gib:.1f} free"),
        ("device", here.device),
    ]
    return _section("Machine", rows)


def _card(one: Card) -> str:
    capability = ".".join(map(str, one.capability))
    return f"{one.name}, {one.gib:.1f} GiB, {one.free_gib:.1f} free, compute capability {capability}"


def _kernels(found: tuple[KernelStatus, ...]) -> list[str]:
    marks = {True: "ok", False: "no", None: "?"}
    rows = [(one.name, marks[one.usable], one.note + (", taken by default" if one.chosen else "")) for one in found]
    return _section("Attention kernels, the fastest first", rows)


def _fits(found: tuple[MemoryFit, ...]) -> list[str]:
    if not found:
        return []
    rows = [("model", "size", "frames", "peak", "how --memory auto would run it")]
    for one in found:
        size = "x".join(map(str, one.size))
        if one.plan is None:
            rows.append((one.model, size, str(one.frames), "-", f"does not fit: {one.refusal.partition('; ')[2]}"))
        else:
            how = f"{one.plan.quantization or 'bfloat16'}, {one.plan.placement()}"
            rows.append((one.model, size, str(one.frames), f"{one.gib:.1f} GiB", how))
    return _section("Videos in the memory that is free", rows)


def _checkpoints(found: tuple[LocalCheckpoint, ...]) -> list[str]:
    rows = [(one.name, one.kind, one.problem or f"complete: {', '.join(one.parts)}") for one in found]
    rows = rows or [("none", "", "")]
    return _section("Checkpoints here", rows)


def _section(title: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A title and a table, with an empty line after it."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    lines = ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    return [title, *lines, ""]
