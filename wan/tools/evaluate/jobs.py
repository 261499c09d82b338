"""The videos that every setting makes: each prompt with each of its seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nabla import InputError
from wan.config.config_files import CONFIG_FOLDER
from wan.config.settings import Settings
from wan.run.jobs import words_of

PROMPTS = "evaluation.txt"
PROMPT_FOLDER = CONFIG_FOLDER / "prompts"
# From one seed of a prompt to its next, so that they meet those of no other prompt of a file of usual length.
STRIDE = 10_000


@dataclass(frozen=True)
class Job:
    """A video to make in each way that is compared.

    prompt: number of its prompt, from 0; take: which of the prompt's videos it is, each with a seed of its own
    settings: as the baseline makes it
    """

    name: str
    prompt: int
    take: int
    settings: Settings


def find_prompts(name: Path) -> Path:
    """A file of prompts by its path, or by name in configs/prompts."""
    if not name.exists() and (PROMPT_FOLDER / name).is_file():
        return PROMPT_FOLDER / name
    return name


def jobs_of(videos: Sequence[Settings], takes: int = 1, base_seed: int = 0) -> list[Job]:
    """Jobs of several prompts' settings, prompt by prompt, take by take.

    A prompt that has a seed counts on from that, others from `base_seed` and their number. All first takes come first,
    so that a run that is cut has some of every prompt.
    """
    if takes < 1:
        raise InputError(f"seeds {takes} must be 1 or more")
    # None is drawn anew, not for -1 either: every setting has to have the same, and so has a run that goes on.
    if base_seed < 0:
        raise InputError(f"base_seed {base_seed} is below 0; give one of 0 or more, or leave it out for 0")
    return [_job(number, take, one, base_seed) for take in range(takes) for number, one in enumerate(videos)]


def _job(number: int, take: int, settings: Settings, base_seed: int) -> Job:
    own = settings.sampling.seed
    seed = (base_seed + number if own in (None, -1) else own) + take * STRIDE
    sampling = replace(settings.sampling, seed=seed)
    name = f"{number:03d}-{words_of(settings.prompt or '')}-{take}"
    return Job(name, number, take, replace(settings, sampling=sampling))


def shown(jobs: Iterable[Job], count: int) -> list[Job]:
    """The first takes of so many prompts, spread over all of them."""
    firsts = [job for job in jobs if job.take == 0]
    if count >= len(firsts):
        return firsts
    return [firsts[index * len(firsts) // count] for index in range(count)]
