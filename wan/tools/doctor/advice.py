"""What to run here, and what would make it faster."""

from __future__ import annotations

from dataclasses import dataclass

from wan.quantize.float8 import ADA
from wan.tools.doctor.checkpoints import LocalCheckpoint
from wan.tools.doctor.fits import MemoryFit
from wan.tools.doctor.kernels import KernelStatus
from wan.tools.doctor.machine import Machine
from wan.tools.doctor.packages import IS_SOURCE, PackageStatus

# An installed one is a module.
PROGRAM = "generate.py" if IS_SOURCE else "-m generate"
PROMPT = '--prompt "Two cats box under a spotlight"'
CONFIG, TUNED = "nabla_0.7.yaml", "ai-forever/Wan2.1-T2V-14B-NABLA-0.7"
SMALL_TASK, SMALL_NAME = "t2v-1.3B", "Wan-AI/Wan2.1-T2V-1.3B"
SHAPES_PROMPT = '--prompt "a red circle moves from left to right on a white background"'
# The best first: the large model in full size, then smaller videos, then the small model.
PREFERENCE = ("14B", (1280, 720)), ("14B", (832, 480)), ("1.3B", (832, 480))
# What is taken only if nothing faster fits.
SLOW = 1.5
HOPPER = (9, 0)


@dataclass(frozen=True)
class Advice:
    """commands: to run one after the other; why: for these; faster: what would help, the most useful first"""

    commands: tuple[str, ...]
    why: str
    faster: tuple[str, ...]


def advise(
    machine: Machine,
    kernels: tuple[KernelStatus, ...],
    packages: tuple[PackageStatus, ...],
    fits: tuple[MemoryFit, ...],
    checkpoints: tuple[LocalCheckpoint, ...],
) -> Advice:
    chosen = _choose(fits)
    if chosen is None:
        commands, why = (_shapes_command(machine),) if IS_SOURCE else (), _why_shapes(machine)
    else:
        commands, why = (_command(machine, chosen),), _why(chosen, checkpoints)
    return Advice(commands, why, tuple(_faster(machine, kernels, packages, chosen)))


def _choose(fits: tuple[MemoryFit, ...]) -> MemoryFit | None:
    # The preferred one that is not slowed down much; if all are, the preferred one.
    possible = [fit for key in PREFERENCE for fit in fits if (fit.model, fit.size) == key and fit.plan is not None]
    return next((fit for fit in possible if fit.plan.slowdown <= SLOW), possible[0] if possible else None)


def _command(machine: Machine, fit: MemoryFit) -> str:
    # One that is named by its number is to run alone, and a plan of memory is for one.
    count = 1 if ":" in machine.device or not fit.is_plain else len(machine.cards)
    start = "python" if count == 1 else f"torchrun --nproc_per_node={count}"
    what = f"--config {CONFIG}" if fit.model == "14B" else f"--task {SMALL_TASK}"
    size = "" if fit.size == (1280, 720) else f' --size "{fit.size[0]}*{fit.size[1]}"'
    flags = "" if fit.is_plain else " --memory auto"
    device = f" --device {machine.device}" if ":" in machine.device else ""
    return f"{start} {PROGRAM} {PROMPT} {what}{size}{flags}{device}"


def _why(fit: MemoryFit, checkpoints: tuple[LocalCheckpoint, ...]) -> str:
    name = TUNED if fit.model == "14B" else SMALL_NAME
    here = any(one.name == name and not one.problem for one in checkpoints)
    source = "which is here already" if here else "which is downloaded on first use"
    return f"the best that fits: {fit.model} at {fit.size[0]}x{fit.size[1]}, of {name}, {source}"


def _shapes_command(machine: Machine) -> str:
    """A video of the checkpoint that comes with the program, which any machine can make."""
    device = " --device cpu" if machine.cards and machine.device == "cpu" else ""
    return f"python {PROGRAM} {SHAPES_PROMPT}{device}"


def _why_shapes(machine: Machine) -> str:
    reason = "nothing larger fits on this card" if machine.card else "on a CPU"
    source = "program" if IS_SOURCE else "program's source, and not with an installed package,"
    return f"{reason}, the small checkpoint that comes with the {source} makes videos of moving shapes"


def _faster(
    machine: Machine, kernels: tuple[KernelStatus, ...], packages: tuple[PackageStatus, ...], chosen: MemoryFit | None
) -> list[str]:
    if machine.card is None:
        there = f"the GPU that is there, {machine.cards[0].name}: --device cuda" if machine.cards else machine.unseen
        return [there or "a GPU: the models of Wan2.1 are too large for CPUs"]
    found = []
    cudnn = next(kernel for kernel in kernels if kernel.name == "cudnn")
    if machine.card.capability >= HOPPER and cudnn.usable is False:
        package = next(one for one in packages if one.name == "nvidia-cudnn-frontend")
        found.append(f"the cudnn kernel ({cudnn.note}): {package.install}")
    # `usable` is None where nothing was checked, of which nothing is said.
    if next(kernel for kernel in kernels if kernel.name == "flex").usable is False:
        found.append(
            "the flex kernel, without which attention is as slow as its plain reference; see above for its fault"
        )
    install = next(one.install for one in packages if one.name == "torchao")
    if _problem(packages, "torchao") and (chosen is None or (chosen.model, chosen.size) != PREFERENCE[0]):
        found.append(f"weights in int8 or 4 bits, with which --memory auto may fit a larger model or video: {install}")
    if _can_fp8(machine) and _problem(packages, "torchao"):
        found.append(f"--fp8, linear layers in float8: {install}")
    elif _can_fp8(machine) and chosen is not None and chosen.is_plain:
        found.append("--fp8: linear layers in float8, a forward a quarter faster, outputs off by some percent")
    if len(machine.cards) > 1 and chosen is not None and not chosen.is_plain:
        start = f"torchrun --nproc_per_node={len(machine.cards)}"
        found.append(f"all GPUs: {start} and --dit_fsdp --t5_fsdp in place of --memory")
    if len(machine.cards) == 1:
        found.append("another GPU: torchrun runs the guidance branches side by side, nearly twice as fast")
    return found


def _can_fp8(machine: Machine) -> bool:
    return machine.card is not None and machine.card.capability >= ADA


def _problem(packages: tuple[PackageStatus, ...], name: str) -> str:
    return next(one.problem for one in packages if one.name == name)
