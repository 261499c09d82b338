"""What is compared: an attention, and a step cache if there is one, by a name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nabla import InputError, NablaConfig
from wan.config.attention_settings import SAYS_WHICH, attention_config, attention_to_dict
from wan.config.cache_settings import CacheSettings
from wan.config.config_files import PROFILE, read_settings
from wan.config.settings import Settings
from wan.models.checkpoint import Checkpoint

FILES = (".yaml", ".yml", ".json")
MAX_NAME = 60


@dataclass(frozen=True)
class Compared:
    """One way to run a checkpoint. name: of its folder too"""

    name: str
    attention: NablaConfig = NablaConfig()
    cache: CacheSettings | None = None

    def of(self, settings: Settings) -> Settings:
        """The same video, made in this way."""
        return replace(settings, model=replace(settings.model, attention=self.attention, cache=self.cache))

    @property
    def is_baseline(self) -> bool:
        """Whether it is dense attention and nothing else, whatever it is called."""
        return self.attention.is_dense and self.cache is None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the YAML files have them."""
        cache = None if self.cache is None else asdict(self.cache)
        return {"attention": attention_to_dict(self.attention), "cache": cache}


DENSE = Compared("dense")


def read_compared(given: Sequence[str], checkpoint: Checkpoint | None = None) -> list[Compared]:
    """What each of several texts names, behind the dense baseline, which there always is.

    A text is an algorithm, such as `nabla-0.7`, a profile, as `profile:FILE`, or a file of settings, by path or by name
    in configs/, of which `attention` and `cache` alone count. checkpoint: what a text does not say is what generate.py
    takes with this one.
    Raises `InputError` for what is neither, and for a name that stands for two.
    """
    found = [DENSE]
    for text in given:
        name, layer = _layer_of(text)
        attention = {"algorithm": "dense"} if layer.get("attention") is None else layer["attention"]
        one = Compared(name, _attention(text, attention, checkpoint), CacheSettings.parse(layer.get("cache")))
        if one.is_baseline:
            continue
        if twin := next((other for other in found if other.name == one.name), None):
            if twin == one:
                raise InputError(f"setting {text} is given twice; leave one out")
            raise InputError(f"two settings would both be called {one.name}; rename the file of one")
        found.append(one)
    if len(found) == 1:
        raise InputError("nothing is compared with dense attention; give --settings, such as nabla-0.7 or a YAML file")
    return found


def held_against(compared: Sequence[Compared], name: str | None) -> Compared:
    """The setting of a name that others are held against, by default the first beside the baseline.

    Raises `InputError` if there is none.
    """
    names = [one.name for one in compared]
    if name is None:
        return compared[1]
    if name not in names:
        raise InputError(f"against {name} is none of the settings {', '.join(names)}; name one of them")
    return compared[names.index(name)]


def stands_alone(text: str) -> bool:
    """Whether a setting says its algorithm, and not only what goes beside that of a checkpoint."""
    attention = _layer_of(text)[1].get("attention")
    return not isinstance(attention, Mapping) or any(attention.get(name) is not None for name in SAYS_WHICH)


def _layer_of(text: str) -> tuple[str, Mapping[str, Any]]:
    """The name of a setting, and what it says, in the schema of the YAML files."""
    if text.startswith(PROFILE):
        return _name(Path(text.removeprefix(PROFILE)).stem), {"attention": {"algorithm": text}}
    if not text.endswith(FILES):
        return _name(text), {"attention": {"algorithm": text}}
    layer = read_settings(text)
    if layer.get("attention") is None and layer.get("cache") is None:
        raise InputError(f"setting {text} names neither attention nor cache, which are compared; add one")
    return _name(Path(text).stem), layer


def _attention(text: str, given: object, checkpoint: Checkpoint | None) -> NablaConfig:
    if not isinstance(given, Mapping):
        raise InputError(f"setting {text}: attention {given!r} is not a mapping of settings")
    if checkpoint is None:
        return attention_config(given)
    return checkpoint.resolve({"attention": given}, needs_prompt=False).attention


def _name(text: str) -> str:
    """As part of a path."""
    return re.sub(r"[^\w.+-]", "-", text)[:MAX_NAME].lstrip(".") or "setting"
