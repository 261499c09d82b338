"""What a visitor of the page may ask for, and in which order the videos of several are made."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nabla import InputError
from wan.config.settings import Settings

# Of videos that wait: of everyone, of an address, of one session of a browser.
MAX_WAITING, MAX_OF_ADDRESS, MAX_OF_SESSION = 20, 10, 4
# What is enough for the models that there are; presets that want more raise it.
USUAL_FRAMES, USUAL_PIXELS, USUAL_STEPS = 241, 1280 * 720, 100


@dataclass(frozen=True)
class Limits:
    """The most that one video may be. pixels: of a frame. Raises `InputError` unless all are positive."""

    frames: int = USUAL_FRAMES
    pixels: int = USUAL_PIXELS
    steps: int = USUAL_STEPS

    def __post_init__(self) -> None:
        for name, most in vars(self).items():
            if most < 1:
                raise InputError(f"max_{name} {most} is not a positive whole number")

    @classmethod
    def of(cls, flags: dict[str, int | None], presets: Iterable[Settings]) -> Limits:
        """Limits as the operator's flags say; else the usual ones, or what the presets need if that is more."""
        every = list(presets)
        needed = {
            "frames": max(one.video.frame_num for one in every),
            "pixels": max(math.prod(one.video.size) for one in every),
            "steps": max(one.sampling.steps for one in every),
        }
        usual = vars(USUAL_LIMITS)
        return cls(**{n: max(usual[n], needed[n]) if flags.get(n) is None else flags[n] for n in needed})

    def check(self, settings: Settings) -> None:
        """Raise `InputError` for a video that is beyond the limits."""
        video = settings.video
        if video.frame_num > self.frames:
            raise InputError(f"{video.frame_num} frames are more than this page makes; use up to {self.frames}")
        if math.prod(video.size) > self.pixels:
            size = "x".join(map(str, video.size))
            raise InputError(f"size {size} is larger than this page makes; use up to {self.pixels} pixels")
        if settings.sampling.steps > self.steps:
            raise InputError(f"{settings.sampling.steps} steps are more than this page takes; use up to {self.steps}")


USUAL_LIMITS = Limits()


class Visitor(NamedTuple):
    """Who asks: the network address, and the session of the browser, which whoever asks can make up."""

    address: str = ""
    session: str | None = ""

    @classmethod
    def at(cls, host: str | None, session: str | None) -> Visitor:
        """The visitor at a host; all addresses of one IPv6 network are one, for a machine has as many as it likes."""
        try:
            address = ipaddress.ip_address(host or "")
        except ValueError:
            return cls(host or "", session)
        # A server on :: sees IPv4 visitors as ::ffff:a.b.c.d, which one network of 64 bits would make a single visitor.
        if address.version == 6 and address.ipv4_mapped is None:
            return cls(str(ipaddress.ip_network((address, 64), strict=False)), session)
        return cls(str(getattr(address, "ipv4_mapped", None) or address), session)


NOBODY = Visitor()


def check_waiting(visitors: Sequence[Visitor], visitor: Visitor) -> None:
    """Raise `InputError` if a visitor may not have one more job beside those of `visitors`, of which one runs."""
    # Beyond the limit only at one more, since one of those counted may be the one that runs.
    if visitors.count(visitor) > MAX_OF_SESSION:
        raise InputError(f"{MAX_OF_SESSION} of your videos are waiting already; try again when one is made")
    if sum(one.address == visitor.address for one in visitors) > MAX_OF_ADDRESS:
        raise InputError(f"{MAX_OF_ADDRESS} videos from your address are waiting; try again when one is made")
    if len(visitors) > MAX_WAITING:
        raise InputError(f"{MAX_WAITING} videos are waiting already; try again later")


class Line:
    """Jobs that wait, each with a `visitor`: addresses take turns, and so do the sessions of one address.

    Nobody who comes later, under however many names, is served twice before one who waits.
    """

    def __init__(self) -> None:
        self._jobs: list[Any] = []
        self._turn = 0
        # By address and by visitor that has jobs here: the turn at which it was served last, or came.
        self._since: dict[Any, int] = {}

    def join(self, job: Any) -> None:
        for key in _keys(job):
            # Who has jobs here keeps his turn; who comes anew is as if served just now, behind all that wait.
            self._since.setdefault(key, self._turn)
        self._jobs.append(job)

    def leave(self, job: Any) -> None:
        """Take a job out, if it is there."""
        if job in self._jobs:
            self._jobs.remove(job)
            present = {key for one in self._jobs for key in _keys(one)}
            self._since = {key: turn for key, turn in self._since.items() if key in present}

    def next(self) -> Any | None:
        """Take out the job whose turn it is; None if nobody waits."""
        if not self._jobs:
            return None
        job = self.order()[0]
        self._turn += 1
        self._since |= dict.fromkeys(_keys(job), self._turn)
        self.leave(job)
        return job

    def order(self) -> list[Any]:
        """The jobs in the order in which they would be served if nobody else came."""
        left, since, order = list(self._jobs), dict(self._since), []
        for turn in range(self._turn + 1, self._turn + 1 + len(left)):
            # First the address that was served longest ago, then its session; of equals the first to have come.
            job = min(left, key=lambda one: [since[key] for key in _keys(one)])
            since |= dict.fromkeys(_keys(job), turn)
            left.remove(job)
            order.append(job)
        return order


def _keys(job: Any) -> tuple[str, Visitor]:
    return job.visitor.address, job.visitor
