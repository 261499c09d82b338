"""How much an attention changes what the transformer gives out, beside dense attention on the same states."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wan import WanT2V
from wan.models.wan.condition import Guidance
from wan.observe.observer import Observer
from wan.sampling.loop import video_steps
from wan.tools.study.bench import SEED_STEP, Bench
from wan.tools.study.settings import Setting

LEVELS = 5


class State(NamedTuple):
    """What a transformer is called with in a sampling step: latents (B, C, T, h, w), timesteps (B,), text (B, L, C)."""

    step: int
    latents: Tensor
    timestep: Tensor
    text: Tensor


class OutputErrors:
    """States of dense walks at the middle of each fifth of the steps, and what dense attention makes of them."""

    def __init__(self, bench: Bench):
        self.bench, self.steps = bench, bench.args.steps

    @cached_property
    def states(self) -> list[State]:
        args, pipe = self.bench.args, self.bench.dense()
        prompts = [text for text, _ in self.bench.sentences(args.prompts)]
        wanted = sorted({int((level + 0.5) * self.steps / LEVELS) for level in range(LEVELS)})
        texts = pipe.encode_text(*pipe.tokenize(prompts * args.seeds))
        negative = pipe.encode_text(*pipe.tokenize(pipe.sampling.negative_prompt)).expand_as(texts)
        seeds = [args.seed + SEED_STEP * seed + n for seed in range(args.seeds) for n in range(len(prompts))]
        noise = torch.cat([pipe.draw_noise(pipe.video, seed) for seed in seeds])
        watch = Watch(wanted, len(texts))
        with watch.watching(pipe.transformer):
            pipe.sample(texts, negative, noise=noise, observer=watch)
        return watch.states

    @cached_property
    def dense(self) -> list[Tensor]:
        """For each state the output with dense attention."""
        pipe = self.bench.dense()
        return [self._output(pipe, state) for state in self.states]

    def measure(self, setting: Setting) -> dict[str, list[float]]:
        """Relative errors, a value for each prompt and seed: the mean over levels, and each level's."""
        # Before the attention is set, which they set too.
        exact = self.dense
        pipe = self.bench.set_up(setting)
        errors = torch.stack([relative(self._output(pipe, state), one) for state, one in zip(self.states, exact)])
        levels = {f"level_{number}": row.tolist() for number, row in enumerate(errors)}
        return {"error": errors.mean(0).tolist(), **levels}

    @torch.no_grad()
    def _output(self, pipe: WanT2V, state: State) -> Tensor:
        with video_steps(pipe.transformers, self.steps) as set_step:
            # The first step tells of a new video.
            set_step(0)
            set_step(state.step)
            return pipe.predict(state.latents, state.timestep, Guidance(state.text))


class Watch(Observer):
    """Keeps what the transformer is called with for the prompts, in some steps.

    batch: how many there are; where branches of guidance run as one batch, the prompts come first
    """

    def __init__(self, wanted: list[int], batch: int):
        self.wanted, self.batch, self.step = wanted, batch, -1
        self.states: list[State] = []

    def step_begins(self, step: int) -> None:
        self.step = step

    def watching(self, transformer: nn.Module) -> Any:
        """To be entered while a video is sampled."""
        return transformer.register_forward_pre_hook(self._see)

    def _see(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Of the branches of a step the prompts' comes first.
        if self.step in self.wanted and all(state.step != self.step for state in self.states):
            latents, timestep, text = (one[: self.batch].clone() for one in args[:3])
            self.states.append(State(self.step, latents, timestep, text))


def relative(output: Tensor, exact: Tensor) -> Tensor:
    """The norm of the difference to `exact`, of the norm of that, for each of a batch."""
    return (output - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
