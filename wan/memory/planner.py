"""How to run within a budget of memory: a pure function of what the models weigh and what the video is.

Three stages follow each other: text, sampling, decoding. Either all models stay on the GPU, or each is there in its
stage alone, the transformer's and the text encoder's blocks streamed through two buffers if even one model is too
large. Of what fits, the plan that costs least is taken: a slowdown counts as it is, precision by `COSTS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, product

from nabla import InputError
from wan.memory.estimates import (
    CHUNK,
    GGUF,
    GIB,
    MOST_TILES,
    Weights,
    Work,
    decode_bytes,
    forward_bytes,
    pinned_bytes,
    text_bytes,
)

GB = 10**9
# How many times slower a run may be before the next packing is taken instead. float8 is only taken when asked for: it
# is faster, but as large as int8 and less exact.
COSTS = {"fp8": 1.0, "int8": 1.2, "int4": 2.0}
TEXT_COSTS = {"int8": 1.1}
COST_OF_TILES = 1.05
COST_OF_TURNS = 1.01
# A block is computed from its weights once a token: this many tokens hide the transfer of half-precision weights from
# pinned host memory. 16,000 is 800 TFLOP/s over 50 GB/s; slower GPUs have slower links too.
TOKENS_TO_HIDE = 16_000
PAGEABLE = 4
# Beyond a share of host memory pinning fails on some systems, and starves others.
PINNED_SHARE = 0.5
# Allocated memory that lies idle between tensors.
FRAGMENTS = 0.04
# A process with models loaded, before any weights.
PROCESS = 4 * GIB
# For each number of the largest layer: what packing takes, and what unpacking it at each use does.
PACKING_BYTES = {"int8": 12, "fp8": 12, "int4": 24}
UNPACKING_BYTES = {"int8": 8, "int4": 16, GGUF: 12}


@dataclass(frozen=True)
class Budget:
    """Free bytes: of the GPU, to stay under, and of the host, out of `host_total`.

    besides: what the process takes of the GPU in any case, so that `gpu` and this are what a run is told to stay under
    """

    gpu: int
    host: int
    host_total: int
    besides: int = 0


@dataclass(frozen=True)
class Plan:
    """How to run. packing, text_packing: of linear layers, None for the dtype that was asked for.

    in_turns: each model is on the GPU in its stage alone
    kept: blocks of the transformer that are there for all of its stage; the others are streamed
    text: where the text encoder runs: "gpu", "stream" (block by block) or "cpu"
    tiles: columns that the picture is decoded in
    pinned: whether weights that are moved wait in pinned host memory
    stages: the expected peak of each on the GPU, in bytes; host: the same of the host
    slowdown: expected, by transfers that computing does not hide
    """

    packing: str | None
    text_packing: str | None
    in_turns: bool
    kept: int
    blocks: int
    text: str
    tiles: int
    pinned: bool
    stages: Mapping[str, int]
    host: int
    slowdown: float

    @property
    def peak(self) -> int:
        """Expected bytes of tensors on the GPU at the most."""
        return max(self.stages.values())

    @property
    def cost(self) -> float:
        precision = COSTS.get(self.packing, 1.0) * TEXT_COSTS.get(self.text_packing, 1.0)
        return self.slowdown * precision * (COST_OF_TILES if self.tiles > 1 else 1)

    def describe(self, budget: Budget, dtype: str) -> str:
        """One line: what was chosen, and the expected peaks beside what there is."""
        stages = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.stages.items())
        return (
            f"transformer {self.packing or dtype}, {self.placement()}; text encoder {self.text_packing or dtype}, "
            f"{self._text()}; decoding {f'in {self.tiles} overlapping tiles' if self.tiles > 1 else 'whole'}; "
            f"expected peak {self.peak / GIB:.1f} of {budget.gpu / GIB:.1f} GiB ({stages}), "
            f"host {self.host / GIB:.1f} of {budget.host / GIB:.1f} GiB free"
        )

    def placement(self) -> str:
        """Where the transformer is, in words."""
        if not self.in_turns:
            return "on the GPU throughout"
        if self.kept == self.blocks:
            return "on the GPU while it samples"
        memory = "pinned" if self.pinned else "pageable"
        some = f", {self.kept} of {self.blocks} kept there" if self.kept else ""
        slow = f", about {self.slowdown:.1f} times as long" if self.slowdown > 1.05 else ", hidden behind computing"
        return f"blocks streamed from {memory} host memory{some}{slow}"

    def _text(self) -> str:
        return {"gpu": "whole on the GPU", "stream": "streamed by blocks", "cpu": "on the CPU"}[self.text]


def choose(
    transformer: Weights,
    text: Weights,
    vae_bytes: int,
    work: Work,
    budget: Budget,
    packing: str | None = None,
    can_pack: bool = True,
    text_cpu: bool = False,
) -> Plan:
    """The plan that costs least of those that fit.

    packing: of the transformer, if that is not open, `GGUF` if its file packs it
    can_pack: whether others than the given one may be chosen
    text_cpu: the text encoder has to run on the CPU
    Raises `InputError` if none fits, with what would.
    """
    case = _Case(transformer, text, vae_bytes, work, budget, text_cpu)
    packings = [packing] if packing or not can_pack else [None, "int8", "int4"]
    of_text = [None, "int8"] if can_pack else [None]
    candidates = list(chain.from_iterable(case.plans(*both) for both in product(packings, of_text)))
    fitting = [plan for plan in candidates if _fits(plan, budget)]
    if not fitting:
        raise InputError(_refusal(candidates, work, budget))
    return min(fitting, key=lambda plan: plan.cost)


@dataclass(frozen=True)
class _Case:
    """What `choose` is given."""

    transformer: Weights
    text: Weights
    vae_bytes: int
    work: Work
    budget: Budget
    text_cpu: bool

    def plans(self, packing: str | None, text_packing: str | None) -> Iterator[Plan]:
        """All plans of a precision, those in which the models stay on the GPU first, in ever more columns."""
        transformer = self.transformer
        usable = self.budget.gpu / (1 + FRAGMENTS)
        forward = forward_bytes(self.work) + UNPACKING_BYTES.get(packing, 0) * transformer.largest
        encoding = text_bytes(self.work) + UNPACKING_BYTES.get(text_packing, 0) * self.text.largest
        waiting = pinned_bytes(transformer.block(packing), transformer.blocks)
        pinned = waiting <= PINNED_SHARE * self.budget.host_total
        kept = kept_blocks(transformer, packing, self.work, usable - forward, pinned)
        slower = COST_OF_TURNS * slowdown(transformer, packing, self.work, kept, pinned)
        for in_turns, tiles in product((False, True), range(1, MOST_TILES + 1)):
            whole_text = self.text.bytes(text_packing) + encoding
            place = "cpu" if self.text_cpu else "stream" if in_turns and whole_text > usable else "gpu"
            sizes = {
                "text": {"gpu": self.text.bytes(text_packing), "stream": self.text.streamed(text_packing), "cpu": 0}[
                    place
                ],
                "sampling": transformer.streamed(packing, kept) if in_turns else transformer.bytes(packing),
                "decoding": self.vae_bytes,
            }
            needs = {
                "text": 0 if self.text_cpu else encoding,
                "sampling": forward,
                "decoding": decode_bytes(self.work, tiles),
            }
            resident = 0 if in_turns else sum(sizes.values())
            stages = {stage: needs[stage] + (resident or sizes[stage]) for stage in sizes}
            if taken := self.packing_bytes(packing, text_packing):
                stages = {"loading": taken + resident} | stages
            yield Plan(
                packing=packing,
                text_packing=text_packing,
                in_turns=in_turns,
                kept=kept if in_turns else transformer.blocks,
                blocks=transformer.blocks,
                text=place,
                tiles=tiles,
                pinned=pinned,
                stages=stages,
                host=self.host_bytes(packing, text_packing, in_turns),
                slowdown=slower if in_turns else 1.0,
            )

    def packing_bytes(self, packing: str | None, text_packing: str | None) -> int:
        """What packing the largest layer takes."""
        both = (self.transformer, packing), (self.text, text_packing)
        return max(PACKING_BYTES.get(kind, 0) * weights.largest for weights, kind in both)

    def host_bytes(self, packing: str | None, text_packing: str | None, in_turns: bool) -> int:
        """What waits in host memory, at the most."""
        text = self.text.bytes(text_packing)
        if not in_turns:
            # A GGUF file is read as a whole before it goes to the GPU.
            read = self.transformer.bytes(packing) if packing == GGUF else 0
            return PROCESS + max(read, text if self.text_cpu else 0)
        waiting = pinned_bytes(self.transformer.block(packing), self.transformer.blocks) + self.transformer.rest
        # While weights are copied to pinned memory, a chunk of them is there twice.
        return PROCESS + waiting + min(CHUNK, self.transformer.bytes(packing)) + text + self.vae_bytes


def kept_blocks(transformer: Weights, packing: str | None, work: Work, room: float, pinned: bool) -> int:
    """Blocks to keep on the GPU in `room` bytes: all, or none if their transfer is hidden, or as many as fit."""
    if transformer.bytes(packing) <= room:
        return transformer.blocks
    if slowdown(transformer, packing, work, 0, pinned) == 1:
        return 0
    return max(0, int((room - transformer.rest) // transformer.block(packing)) - 2)


def slowdown(transformer: Weights, packing: str | None, work: Work, kept: int, pinned: bool) -> float:
    """How many times as long a forward takes as without transfers, which go on while it computes."""
    share = 1 - kept / transformer.blocks
    packed = transformer.block(packing) / transformer.block(None)
    # Products in float8 take half the time too.
    packed = 2 * packed if packing == "fp8" else packed
    hiding = TOKENS_TO_HIDE * (1 if pinned else PAGEABLE) * transformer.itemsize / 2
    return max(1.0, share * packed * hiding / work.tokens)


def _fits(plan: Plan, budget: Budget) -> bool:
    return plan.peak * (1 + FRAGMENTS) <= budget.gpu and plan.host <= budget.host


def _refusal(candidates: list[Plan], work: Work, budget: Budget) -> str:
    """What is too small, and what of the GPU or of the host would do."""
    enough = []
    if on_host := [plan for plan in candidates if plan.host <= budget.host]:
        plan = min(on_host, key=lambda plan: plan.peak)
        stage = max(plan.stages, key=plan.stages.get)
        needed = math.ceil((plan.peak * (1 + FRAGMENTS) + budget.besides) / GB * 10) / 10
        enough.append(f"{needed:.1f} GB of the GPU (for {stage})")
    if on_gpu := [plan for plan in candidates if plan.peak * (1 + FRAGMENTS) <= budget.gpu]:
        enough.append(f"{math.ceil(min(plan.host for plan in on_gpu) / GIB * 10) / 10:.1f} GiB of host memory")
    gpu, host = (budget.gpu + budget.besides) / GB, budget.host / GIB
    return (
        f"memory: {work.frames} frames of {work.size[0]}*{work.size[1]} do not fit into {gpu:.1f} GB of the GPU with "
        f"{host:.1f} GiB of host memory free; {' or '.join(enough) or 'more of both'} would do, "
        "or a smaller --size or fewer frames (--frame_num)"
    )
