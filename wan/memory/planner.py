"""How to run within a budget of memory: a pure function of what the models weigh and what the video is.

Stages follow each other: text, a picture if one is given, sampling, decoding. Either all models stay on the GPU, or
each is there in its stage alone, of several experts one at a time, the transformer's and the text encoder's blocks
streamed through two buffers if even one model is too large. Of what fits, the plan that costs least is taken: a
slowdown counts as it is, precision as `wan.quantize.table` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from typing import Any

from nabla import InputError
from wan.memory.estimates import (
    CHUNK,
    GIB,
    MOST_TILES,
    Weights,
    Workload,
    decode_bytes,
    forward_bytes,
    pinned_bytes,
    text_bytes,
)
from wan.memory.transfers import kept_blocks, slowdown
from wan.quantize.gguf import GGUF
from wan.quantize.table import QUANTIZATIONS

GB = 10**9
# What sidecars of videos call the fields of a plan that have other names here.
SIDECAR_KEYS = {"quantization": "packing", "text_quantization": "text_packing"}
# What else a plan is worse by, as a slowdown that would be as bad: columns change the picture slightly.
COST_OF_TILES = 1.05
# Of models that move between stages; small, since it is to decide between plans that are alike in all else.
COST_OF_TURNS = 1.01
# Beyond a share of host memory pinning fails on some systems, and starves others.
PINNED_SHARE = 0.5
# Allocated memory that lies idle between tensors.
FRAGMENTS = 0.04
# A process with models loaded, before any weights.
PROCESS = 4 * GIB


@dataclass(frozen=True)
class MemoryBudget:
    """Free bytes: of the GPU, to stay under, and of the host, out of `host_total`.

    besides: what the process takes of the GPU in any case, so that `gpu` and this are what a run is told to stay under
    """

    gpu: int
    host: int
    host_total: int
    besides: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """How to run.

    quantization, text_quantization: keys of those of linear layers; None for the dtype that was asked for
    in_turns: each model is on the GPU in its stage alone
    kept: blocks of the transformer that are there for all of its stage; the others are streamed
    text: where the text encoder runs: "gpu", "stream" (block by block) or "cpu"
    tiles: columns that the picture is decoded in
    pinned: whether weights that are moved wait in pinned host memory
    stages: the expected peak of each on the GPU, in bytes; host: the same of the host
    slowdown: expected, by transfers that computing does not hide
    experts: transformers of one size that take turns while they sample
    encoding_tiles: columns that what is given is encoded in, of which the VAE makes as few as it can
    """

    quantization: str | None
    text_quantization: str | None
    in_turns: bool
    kept: int
    blocks: int
    text: str
    tiles: int
    pinned: bool
    stages: Mapping[str, int]
    host: int
    slowdown: float
    experts: int = 1
    encoding_tiles: int = 1

    @property
    def peak(self) -> int:
        """Expected bytes of tensors on the GPU at the most."""
        return max(self.stages.values())

    @property
    def cost(self) -> float:
        cost = self.slowdown
        if self.quantization is not None:
            cost *= QUANTIZATIONS[self.quantization].cost or 1.0
        if self.text_quantization is not None:
            cost *= QUANTIZATIONS[self.text_quantization].text_cost or 1.0
        return cost * math.prod(COST_OF_TILES for tiles in (self.tiles, self.encoding_tiles) if tiles > 1)

    def to_sidecar(self) -> dict[str, Any]:
        """As a video's sidecar has it, by the keys that these always had."""
        # As records are that were written before there were several of these.
        alone = {name for name in ("experts", "encoding_tiles") if getattr(self, name) == 1}
        return {SIDECAR_KEYS.get(name, name): value for name, value in asdict(self).items() if name not in alone}

    def describe(self, budget: MemoryBudget, dtype: str) -> str:
        """One line: what was chosen, and the expected peaks beside what there is."""
        stages = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.stages.items())
        tiled = "in {} overlapping tiles".format
        decoding = tiled(self.tiles) if self.tiles > 1 else "whole"
        encoding = f"encoding {tiled(self.encoding_tiles)}; " if self.encoding_tiles > 1 else ""
        return (
            f"{self._transformers()} {self.quantization or dtype}, {self.placement()}; "
            f"text encoder {self.text_quantization or dtype}, {self._text()}; {encoding}decoding {decoding}; "
            f"expected peak {self.peak / GIB:.1f} of {budget.gpu / GIB:.1f} GiB ({stages}), "
            f"host {self.host / GIB:.1f} of {budget.host / GIB:.1f} GiB free"
        )

    def placement(self) -> str:
        """Where the transformer is, in words."""
        several = self.experts > 1
        if not self.in_turns:
            return "on the GPU throughout"
        if self.kept == self.blocks:
            return f"{'one at a time ' if several else ''}on the GPU while it samples"
        memory = "pinned" if self.pinned else "pageable"
        of_each = " of each" if several else ""
        some = f", {self.kept} of {self.blocks}{of_each} kept there" if self.kept else ""
        slow = f", about {self.slowdown:.1f} times as long" if self.slowdown > 1.05 else ", hidden behind computing"
        return f"blocks streamed from {memory} host memory{some}{slow}"

    def _transformers(self) -> str:
        return "transformer" if self.experts == 1 else f"{self.experts} experts in"

    def _text(self) -> str:
        return {"gpu": "whole on the GPU", "stream": "streamed by blocks", "cpu": "on the CPU"}[self.text]


def choose(
    transformer: Weights,
    text: Weights,
    vae_bytes: int,
    workload: Workload,
    budget: MemoryBudget,
    quantization: str | None = None,
    can_quantize: bool = True,
    text_cpu: bool = False,
    experts: int = 1,
    picture_bytes: int = 0,
) -> MemoryPlan:
    """The plan that costs least of those that fit.

    transformer: or each of as many `experts`, if they differ the larger one
    quantization: of the transformer, if that is not open, that of GGUF if its file has done so
    can_quantize: whether others than the given one may be chosen
    text_cpu: the text encoder has to run on the CPU
    picture_bytes: what the encoder of pictures weighs, where there is one
    Raises `InputError` if none fits, with what would.
    """
    case = _Case(transformer, text, vae_bytes, workload, budget, text_cpu, experts, picture_bytes)
    own: list[str | None] = [quantization]
    of_text: list[str | None] = [None]
    if can_quantize:
        own += [key for key, one in QUANTIZATIONS.items() if one.cost is not None and quantization is None]
        of_text += [key for key, one in QUANTIZATIONS.items() if one.text_cost is not None]
    candidates = list(chain.from_iterable(case.plans(*both) for both in product(own, of_text)))
    fitting = [plan for plan in candidates if _fits(plan, budget)]
    if not fitting:
        raise InputError(_refusal(candidates, workload, budget))
    return min(fitting, key=lambda plan: plan.cost)


@dataclass(frozen=True)
class _Case:
    """What `choose` is given."""

    transformer: Weights
    text: Weights
    vae_bytes: int
    workload: Workload
    budget: MemoryBudget
    text_cpu: bool
    experts: int
    picture_bytes: int

    def plans(self, quantization: str | None, text_quantization: str | None) -> Iterator[MemoryPlan]:
        """All plans of a precision, those in which the models stay on the GPU first, in ever more columns."""
        transformer = self.transformer
        usable = self.budget.gpu / (1 + FRAGMENTS)
        # Quantised weights are unpacked as they are used, no more than one layer's at a time.
        forward = forward_bytes(self.workload) + _using_bytes(quantization) * transformer.largest
        encoding = text_bytes(self.workload) + _using_bytes(text_quantization) * self.text.largest
        waiting = pinned_bytes(transformer.block(quantization), transformer.blocks) * self.experts
        pinned = waiting <= PINNED_SHARE * self.budget.host_total
        kept = kept_blocks(transformer, quantization, self.workload, usable - forward, pinned)
        slower = COST_OF_TURNS * slowdown(transformer, quantization, self.workload, kept, pinned)
        text_fits = self.text.bytes(text_quantization) + encoding <= usable
        # Of plans that cost the same the first is taken, so that there are no more columns than needed.
        for in_turns, tiles in product((False, True), range(1, MOST_TILES + 1)):
            plan = MemoryPlan(
                quantization=quantization,
                text_quantization=text_quantization,
                in_turns=in_turns,
                kept=kept if in_turns else transformer.blocks,
                blocks=transformer.blocks,
                text="cpu" if self.text_cpu else "stream" if in_turns and not text_fits else "gpu",
                tiles=tiles,
                pinned=pinned,
                stages={},
                host=self.host_bytes(quantization, text_quantization, in_turns),
                slowdown=slower if in_turns else 1.0,
                experts=self.experts,
            )
            yield self.staged(plan, forward, encoding)

    def staged(self, plan: MemoryPlan, forward: int, encoding: int) -> MemoryPlan:
        """A plan with the peak of each stage on the GPU. forward, encoding: what these take beside weights"""
        transformer, text = self.transformer, self.text
        on_gpu = {"gpu": text.bytes, "stream": text.streamed, "cpu": lambda _: 0}[plan.text]
        sizes = {
            "text": on_gpu(plan.text_quantization),
            "sampling": transformer.bytes(plan.quantization) * self.experts,
            "decoding": self.vae_bytes,
        }
        # Either all models are there in every stage, or each in its own.
        resident = 0 if plan.in_turns else sum(sizes.values()) + self.picture_bytes
        if plan.in_turns:
            sizes["sampling"] = transformer.streamed(plan.quantization, plan.kept)
        needs = {
            "text": 0 if self.text_cpu else encoding,
            "sampling": forward,
            "decoding": decode_bytes(self.workload.decoding, plan.tiles),
        }
        stages = {stage: needs[stage] + (resident or sizes[stage]) for stage in sizes}
        tiles, given = self.given(resident or self.vae_bytes)
        if given:
            # The encoder of pictures is gone before the VAE comes.
            stages = {"text": stages.pop("text"), "picture": max(given, self.picture_bytes)} | stages
        if making := self.making_bytes(plan.quantization, plan.text_quantization):
            # On the large side: the last layer may be quantised when all else is there already.
            stages = {"loading": making + resident} | stages
        return replace(plan, stages=stages, encoding_tiles=tiles)

    def given(self, there: int) -> tuple[int, int]:
        """In how few columns what is given can be encoded beside bytes that are there, and the peak; 0 without any."""
        encoding = self.workload.encoding
        if encoding is None:
            return 1, 0
        peaks = [there + self.workload.given + decode_bytes(encoding, tiles + 1) for tiles in range(MOST_TILES)]
        usable = self.budget.gpu / (1 + FRAGMENTS)
        return next(((n + 1, peak) for n, peak in enumerate(peaks) if peak <= usable), (MOST_TILES, peaks[-1]))

    def making_bytes(self, quantization: str | None, text_quantization: str | None) -> int:
        """What quantising the largest layer takes."""
        both = (self.transformer, quantization), (self.text, text_quantization)
        return max(QUANTIZATIONS[key].making_bytes * weights.largest if key else 0 for weights, key in both)

    def host_bytes(self, quantization: str | None, text_quantization: str | None, in_turns: bool) -> int:
        """What waits in host memory, at the most."""
        text = self.text.bytes(text_quantization)
        if not in_turns:
            # A GGUF file is read as a whole before it goes to the GPU.
            read = self.transformer.bytes(quantization) if quantization == GGUF.key else 0
            return PROCESS + max(read, text if self.text_cpu else 0)
        one = pinned_bytes(self.transformer.block(quantization), self.transformer.blocks) + self.transformer.rest
        # While weights are copied to pinned memory, a chunk of them is there twice.
        copied = min(CHUNK, self.transformer.bytes(quantization))
        return PROCESS + one * self.experts + copied + text + self.vae_bytes + self.picture_bytes


def _using_bytes(key: str | None) -> int:
    return 0 if key is None else QUANTIZATIONS[key].using_bytes


def _fits(plan: MemoryPlan, budget: MemoryBudget) -> bool:
    return plan.peak * (1 + FRAGMENTS) <= budget.gpu and plan.host <= budget.host


def _refusal(candidates: list[MemoryPlan], workload: Workload, budget: MemoryBudget) -> str:
    """What is too small, and what of the GPU or of the host would do."""
    enough = []
    if on_host := [plan for plan in candidates if plan.host <= budget.host]:
        plan = min(on_host, key=lambda plan: plan.peak)
        stage = max(plan.stages, key=lambda name: plan.stages[name])
        needed = math.ceil((plan.peak * (1 + FRAGMENTS) + budget.besides) / GB * 10) / 10
        enough.append(f"{needed:.1f} GB of the GPU (for {stage})")
    if on_gpu := [plan for plan in candidates if plan.peak * (1 + FRAGMENTS) <= budget.gpu]:
        enough.append(f"{math.ceil(min(plan.host for plan in on_gpu) / GIB * 10) / 10:.1f} GiB of host memory")
    gpu, host = (budget.gpu + budget.besides) / GB, budget.host / GIB
    width, height = workload.decoding.size
    return (
        f"memory: {workload.decoding.frames} frames of {width}*{height} do not fit into {gpu:.1f} GB of the GPU with "
        f"{host:.1f} GiB of host memory free; {' or '.join(enough) or 'more of both'} would do, "
        "or a smaller --size or fewer frames (--frame_num)"
    )
