"""The JSON file beside a video: what it is of, whether that is there, and which videos are still to be made."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.config.inputs import INPUTS
from wan.config.settings import Settings, resolve
from wan.files.hashes import file_hash
from wan.files.plain_data import read_json
from wan.files.video import count_frames, sidecar_of
from wan.run.records import input_digests, recorded_digests

ENDINGS = (".mp4", ".png")

Video = tuple[Settings, Path]


@dataclass(frozen=True)
class Sidecar:
    """What the JSON file beside a video says. made: the settings; file: name and digest, of older sidecars empty."""

    path: Path
    made: dict[str, Any]
    file: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Sidecar | None:
        """None for a file that is no sidecar, or none that can be read."""
        try:
            content = read_json(path)
            made = _plain(resolve(content["settings"]))
            # The files themselves may have gone since, and their paths may be anyone's.
            made |= {name: recorded_digests(name, content["made_with"][name]) for name in INPUTS if name in made}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        file = content.get("file")
        return cls(path, made, file if isinstance(file, dict) else {})

    @property
    def video(self) -> Path | None:
        """The video or picture that it is of, or None if that is not there."""
        named = self.file.get("name")
        names = [named] if isinstance(named, str) else [self.path.with_suffix(end).name for end in ENDINGS]
        # A sidecar may come from anyone: it names no file of another folder.
        found = [self.path.with_name(name) for name in names if Path(name).name == name]
        return next((path for path in found if path.is_file()), None)

    def is_of(self, wanted: dict[str, Any]) -> bool:
        """Whether it is of a video of these `comparable` settings, whatever seed they draw and however their prompt is
        expanded.
        """
        # A sidecar has the seed that was drawn, which fits where none in particular is asked for.
        any_seed = {"sampling": self.made["sampling"] | {"seed": None}} if wanted["sampling"]["seed"] is None else {}
        made = self.made | any_seed
        if "expanded_prompt" not in wanted:
            # Likewise of the text that the model wrote.
            made.pop("expanded_prompt", None)
        return made == wanted

    def is_whole(self) -> bool:
        """Whether its video is there as it was written."""
        video = self.video
        if video is None:
            return False
        if "sha256" in self.file:
            return file_hash(video) == self.file["sha256"]
        return video.suffix != ".mp4" or count_frames(video) == self.made["video"]["frame_num"]


def still_to_make(videos: Sequence[Video], folder: Path, named: Sequence[bool]) -> list[Video]:
    """The videos for a folder of which no sidecar there says that they are made, wherever they stand in the list.

    named: of each, whether its name was given: then the same video under another one does not count
    """
    sidecars = [one for path in sorted(folder.glob("*.json")) if (one := Sidecar.read(path)) is not None]
    left = []
    for (settings, path), is_named in zip(videos, named, strict=True):
        wanted = comparable(settings)
        fits = [one for one in sidecars if one.is_of(wanted) and (one.video == path or not is_named)]
        # The one at the video's own path first, and only as many hashed as it takes to find one that is whole.
        found = next((one for one in sorted(fits, key=lambda one: one.video != path) if one.is_whole()), None)
        if found is None:
            left.append((settings, path))
        else:
            # Each stands for one video of the list: what is asked for twice is made twice.
            sidecars.remove(found)
    return left


def is_made(path: Path, settings: Settings) -> bool:
    """Whether a video of these settings, whatever seed they draw, stands whole at `path`."""
    sidecar = Sidecar.read(sidecar_of(path))
    return sidecar is not None and sidecar.video == path and sidecar.is_of(comparable(settings)) and sidecar.is_whole()


def check_free(path: Path, settings: Settings, flag: str, overwrite: bool = False) -> None:
    """Raise `InputError` if a video or a sidecar that is there would be lost to a video at `path`, which a flag names.

    One of the same settings that is no longer as it was written is none to keep. overwrite: may it take its own place
    """
    other = f"give --overwrite to replace it, or choose another {flag}"
    sidecar = Sidecar.read(sidecar_of(path))
    if sidecar is not None and sidecar.video not in (None, path):
        raise InputError(f"{sidecar.path} is the record of {sidecar.video}; choose another {flag}")
    if (
        overwrite
        or not path.exists()
        or (sidecar is not None and sidecar.is_of(comparable(settings)) and not sidecar.is_whole())
    ):
        return
    raise InputError(f"{path} is there already{'' if sidecar else ', without its record'}; {other}")


def free_path(path: Path) -> Path:
    """`path`, or with a number if a video of another run has come to stand there."""
    sidecar = Sidecar.read(sidecar_of(path))
    if sidecar is None or not sidecar.is_whole():
        return path
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(one for one in numbered if not one.exists() and not sidecar_of(one).exists())


def comparable(settings: Settings) -> dict[str, Any]:
    """Settings as JSON has them, with one word for a seed that is drawn, and files that it is made of by their digests.

    So a video is the same wherever its picture lies, and another one if the file has changed. Raises `InputError` if
    it cannot be read.
    """
    return _plain(settings) | {name: input_digests(name, given) for name, given in settings.inputs.items()}


def _plain(settings: Settings) -> dict[str, Any]:
    plain = json.loads(json.dumps(settings.to_dict()))
    if plain["sampling"]["seed"] == -1:
        plain["sampling"]["seed"] = None
    return plain
