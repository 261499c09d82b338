"""What may be asked for, and by whom."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from nabla import InputError
from nabla.checks import is_count
from wan.config.checks import check_keys
from wan.config.settings import Settings
from wan.files.plain_data import read_yaml

# What is enough for the models that there are; presets that want more raise it.
USUAL_FRAMES, USUAL_PIXELS, USUAL_STEPS = 241, 1280 * 720, 100


@dataclass(frozen=True)
class Limits:
    """The most that one video may be, and that one request and all of them may bring.

    pixels: of a frame; picture_pixels: of a picture that is sent, width times height, before it is decoded
    upload_mb: of one request, in MB
    waiting, waiting_of_source: jobs that wait, of everyone, and of one token or address
    lora: LoRA files of one video; n: videos of one request; priority: the highest that a request may have
    Raises `InputError` unless all are positive whole numbers; priority may be 0.
    """

    frames: int = USUAL_FRAMES
    pixels: int = USUAL_PIXELS
    steps: int = USUAL_STEPS
    prompt_characters: int = 5_000
    upload_mb: int = 32
    picture_pixels: int = 4096 * 4096
    waiting: int = 1000
    waiting_of_source: int = 1000
    lora: int = 8
    n: int = 8
    priority: int = 0

    def __post_init__(self) -> None:
        for name, most in vars(self).items():
            if not is_count(most) or most < (name != "priority"):
                raise InputError(f"limit of {name} {most!r} is not a positive whole number")

    @classmethod
    def of(cls, given: Mapping[str, Any], presets: Iterable[Settings]) -> Limits:
        """Limits as an operator gives them; else the usual ones, or what the presets need if that is more."""
        every, usual = list(presets), vars(USUAL_LIMITS)
        needed = {
            "frames": max(one.video.frame_num for one in every),
            "pixels": max(math.prod(one.video.size) for one in every),
            "steps": max(one.sampling.steps for one in every),
            "lora": max(len(one.lora) for one in every),
        }
        own = {name: max(usual[name], most) for name, most in needed.items()}
        return cls(**own | {name: most for name, most in given.items() if most is not None})

    def check(self, settings: Settings) -> None:
        """Raise `InputError` for a video that is beyond the limits."""
        video = settings.video
        if video.frame_num > self.frames:
            raise InputError(f"{video.frame_num} frames are more than are made here; use up to {self.frames}")
        if math.prod(video.size) > self.pixels:
            size = "x".join(map(str, video.size))
            raise InputError(f"size {size} is larger than is made here; use up to {self.pixels} pixels")
        if settings.sampling.steps > self.steps:
            raise InputError(f"{settings.sampling.steps} steps are more than are taken here; use up to {self.steps}")
        if len(settings.lora) > self.lora:
            raise InputError(f"lora has {len(settings.lora)} files; use up to {self.lora}")
        self.check_text("prompt", settings.prompt or "")

    def check_text(self, name: str, text: str) -> None:
        """Raise `InputError` for a text of a client that is longer than the limit."""
        if len(text) > self.prompt_characters:
            raise InputError(f"{name} has {len(text)} characters; use up to {self.prompt_characters}")


USUAL_LIMITS = Limits()


def read_limits(path: Path) -> dict[str, Any]:
    """What a YAML file of limits says; raises `InputError` for one that cannot be read, and for a key that is none."""
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise InputError(f"limits {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"limits {path} does not hold a mapping, such as 'frames: 121'")
    check_keys(f"limits {path}", content, [item.name for item in fields(Limits)])
    return content


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
