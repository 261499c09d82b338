"""From mappings, as YAML gives them, to frozen dataclasses: overrides, unknown and missing keys, checks of values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from nabla import InputError
from nabla.checks import is_count, is_number
from wan.config.checks import check_keys, check_path
from wan.config.model_settings import COMPONENTS
from wan.files.plain_data import parse_yaml

# YAML 1.1 takes a number without a point, as 1e-4 is, for a text.
EXPONENTIAL = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", re.ASCII)


def with_overrides(settings: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Settings changed by words of a command line such as `optimizer.lr=1e-4`, values read as YAML.

    Numbers such as 1e-4, which YAML takes for texts, are read as numbers throughout.
    """
    changed = dict(settings)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not all(path.split(".")):
            raise InputError(f"{override!r} is not of the form key=value or section.key=value")
        try:
            layer: Any = parse_yaml(text)
        except ValueError as error:
            raise InputError(f"{override!r}: its value cannot be read ({error}); a text may need quotes") from None
        for key in reversed(path.split(".")):
            layer = {key: layer}
        changed = merge_settings(changed, layer)
    return _with_numbers(changed)


def _with_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and EXPONENTIAL.fullmatch(value) else value


@dataclass(frozen=True, kw_only=True)
class ComponentPlaces:
    """Directories or hub ids that stand in for what a checkpoint has of these, or leaves to others; None: its own."""

    vae: str | None = None
    text_encoder: str | None = None
    text_encoder_2: str | None = None

    @property
    def components(self) -> dict[str, str]:
        """Those that are given, by name."""
        return {name: getattr(self, name) for name in COMPONENTS if getattr(self, name) is not None}


def merge_settings(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings as one, the upper one's values first, mappings in them alike."""
    both = dict(lower)
    for key, value in upper.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = merge_settings(both[key], value) if nested else value
    return both


def from_mapping(kind: type, settings: Mapping[str, Any], where: str, sections: Mapping[str, type]) -> Any:
    """A dataclass of a mapping, of which `sections` are mappings for other dataclasses; null means the default.

    Raises `InputError` for unknown and missing keys.
    """
    check_keys(where, settings, {item.name for item in fields(kind)})
    values = {name: value for name, value in settings.items() if value is not None}
    for item in fields(kind):
        if item.default is MISSING and item.default_factory is MISSING and item.name not in values:
            raise InputError(f"{where} lack {item.name!r}; set it in the config or as {item.name}=VALUE")
    for name, section in sections.items():
        if name in values and not isinstance(values[name], section):
            check_mapping(name, values[name])
            values[name] = from_mapping(section, values[name], name, {})
    return kind(**values)


def to_plain(value: Any) -> Any:
    """The same with lists for tuples, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def text_tuple(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) and text for text in value):
        raise InputError(f"{name} {value!r} are not a list of texts")
    return tuple(value)


def check_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} {value!r} is not a mapping of settings")


def check_texts(settings: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(settings, name), str) or not getattr(settings, name):
            raise InputError(f"{name} {getattr(settings, name)!r} is not a text; give a path or a name")
        check_path(name, getattr(settings, name))


def check_choice(settings: Any, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(settings, name) not in allowed:
        raise InputError(f"{name} {getattr(settings, name)!r} is not known; use one of {', '.join(allowed)}")


def check_flags(settings: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(settings, name), bool):
            raise InputError(f"{name} {getattr(settings, name)!r} is neither true nor false")


def check_counts(settings: Any, *names: str, least: int = 1) -> None:
    for name in names:
        value = getattr(settings, name)
        if not is_count(value) or value < least:
            raise InputError(f"{name} {value!r} is not a whole number of at least {least}")


def check_whole(name: str, value: Any) -> None:
    if not is_count(value) or value >= 2**63:
        raise InputError(f"{name} {value!r} is not a whole number from 0 to 2^63-1")


def check_numbers(
    settings: Any, *names: str, above: float | None = None, least: float | None = None, most: float | None = None
) -> None:
    for name in names:
        value = getattr(settings, name)
        limits = {"above": above, "at least": least, "at most": most}
        wanted = ", ".join(f"{what} {limit}" for what, limit in limits.items() if limit is not None)
        fits = is_number(value) and (above is None or value > above)
        if not fits or (least is not None and value < least) or (most is not None and value > most):
            raise InputError(f"{name} {value!r} is not a number{' ' + wanted if wanted else ''}")


def check_continues(settings: Any, earlier: Any, changeable: Iterable[str]) -> None:
    """Raise `InputError` where settings, other than `changeable` ones, cannot continue a run that began with others."""
    for name in (item.name for item in fields(settings)):
        before, now = getattr(earlier, name), getattr(settings, name)
        if before != now and name not in changeable:
            raise InputError(f"{settings.out} holds a run with {name} {before!r}, not {now!r}; choose another out")
