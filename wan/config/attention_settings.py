"""The `attention` of the settings: layers of it put together, files of profiles read, and what holds where a run says
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from nabla import InputError, KeepProfile, NablaConfig
from nabla.config import CHOICE, KINDS
from wan.config.checks import recordable
from wan.config.config_files import CONFIG_FOLDER, profile_file
from wan.config.measured_files import read_measured
from wan.files.plain_data import read_yaml

# The published program runs this many first steps dense when only a window is used.
STA_DENSE_STEPS = 12
# Of weights that were not tuned for the share of blocks that a run asks for: the first steps decide which video it
# becomes, errors of the first layer go through all others, and one mean says too little of a tile.
UNTUNED_DENSE_STEPS = 0.25
UNTUNED_DENSE_LAYERS = (0,)
# Parts of a tile along each axis: (1, 4, 4) tokens of a tile of (1, 8, 8).
UNTUNED_PARTS = (1, 2, 2)
# Profiles that come with the program.
PROFILE_FOLDER = CONFIG_FOLDER / "profiles"
# Keys that say which algorithm: in a layer, one of them stands for all.
SAYS_WHICH = ("algorithm", "threshold", "keep", "window", "profile")
# What goes with an algorithm, and falls with it.
_BESIDE = (*CHOICE, "dense_steps", "mask_refresh")
# What a profile was measured with, and is to run with where nothing else is said.
_MEASURED_WITH = ("pool", "window", "tile", "dropped")

Layer = dict[str, Any]


def merge_attention(lower: Mapping[str, Any], upper: object) -> Layer:
    """One `attention` mapping of two, of which the upper ranks first; raises `InputError` unless that is a mapping."""
    if not isinstance(upper, Mapping):
        raise InputError(f"attention {upper!r} is not a mapping of settings")
    own = {key: value for key, value in _with_profile(upper).items() if value is not None}
    if any(key in own for key in SAYS_WHICH):
        # Another algorithm: the numbers of the lower one, and what it does over steps, were meant for that one.
        fallen = {*SAYS_WHICH, *_BESIDE} | ({"dense_layers"} if "profile" in own else set())
        lower = {key: value for key, value in lower.items() if key not in fallen}
    return {**lower, **own}


def attention_config(settings: Mapping[str, Any]) -> NablaConfig:
    """An `attention` mapping to its config; a window alone runs its first steps dense unless told otherwise."""
    config = NablaConfig.from_dict(_with_profile(settings))
    if config.profile is not None:
        on = recordable("attention profile measured_on", config.profile.measured_on)
        return replace(config, profile=KeepProfile(config.profile.stretches, on))
    if config.kind == "sta" and settings.get("dense_steps") is None:
        return replace(config, dense_steps=STA_DENSE_STEPS)
    return config


def attention_to_dict(config: NablaConfig) -> Layer:
    """The `attention` mapping that `attention_config` reads back to an equal config; it names no file."""
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    if config.profile is not None:
        gone = {"threshold", "keep", "keep_min", "keep_max", "dense_steps", "dense_layers"}
        plain = values | {"profile": config.profile.to_dict()}
        return {key: value for key, value in plain.items() if key not in gone and value is not None}
    beside = {key: value for key, value in values.items() if key not in (*SAYS_WHICH, *CHOICE)}
    return {"algorithm": config.algorithm} | beside


def untuned_layer(above: Iterable[Mapping[str, Any]], own: Iterable[Mapping[str, Any]], tuned: str | None) -> Layer:
    """What a run's own layers leave unsaid of an attention that its weights were not tuned for, as one layer more.

    above: the run's layers, flags and config, of all settings; own: those of the checkpoint; tuned: the algorithm that
        the weights were tuned for, if they say
    Empty unless the run chooses a share of blocks, `keep`, another one than the weights were tuned for, and says
    nothing of dense steps, dense layers and parts.
    """
    asked = _merged(above)
    try:
        chosen = _chosen(asked)
    except InputError:
        # Of what is wrong there the settings themselves tell.
        return {}
    if chosen.keep is None or chosen.algorithm == tuned:
        return {}
    said = [name for name in ("dense_steps", "dense_layers", "pool") if asked.get(name) is not None]
    if said or "_pool-" in str(asked.get("algorithm")):
        return {}
    tile = asked.get("tile") or _merged(own).get("tile") or NablaConfig.tile
    return {
        "attention": {
            "dense_steps": UNTUNED_DENSE_STEPS,
            "dense_layers": UNTUNED_DENSE_LAYERS,
            "pool": untuned_pool(tile),
        }
    }


def untuned_pool(tile: object) -> tuple[int, ...] | None:
    """The parts of a tile, in tokens, for weights that were not tuned; None where they do not divide it."""
    # A tile that is none is refused where the settings are made.
    if not isinstance(tile, (list, tuple)) or len(tile) != 3 or not all(isinstance(n, int) for n in tile):
        return None
    whole = all(n % parts == 0 for n, parts in zip(tile, UNTUNED_PARTS))
    return tuple(n // parts for n, parts in zip(tile, UNTUNED_PARTS)) if whole else None


def is_untuned(config: NablaConfig) -> bool:
    """Whether a config is as `untuned_layer` makes it."""
    as_made = config.dense_steps == UNTUNED_DENSE_STEPS and config.dense_layers == UNTUNED_DENSE_LAYERS
    return config.keep is not None and as_made and config.pool == untuned_pool(config.tile)


def _merged(layers: Iterable[Mapping[str, Any]]) -> Layer:
    merged: Layer = {}
    for layer in reversed(list(layers)):
        if layer.get("attention") is not None:
            merged = merge_attention(merged, layer["attention"])
    return merged


def _chosen(asked: Mapping[str, Any]) -> NablaConfig:
    """The choice of blocks alone, without what goes beside it."""
    algorithm = asked.get("algorithm")
    if algorithm is not None and algorithm not in KINDS:
        return NablaConfig.parse(algorithm)
    return NablaConfig(**{name: asked[name] for name in ("keep", "window") if name in asked})


def _with_profile(given: Mapping[str, Any]) -> Layer:
    """A mapping with the profile itself where its file is named, and beside it what the file says that goes with it."""
    layer, file = dict(given), profile_file(given)
    if file is not None and layer.get("profile") is None:
        del layer["algorithm"]
    algorithm, profile = layer.get("algorithm"), file or layer.get("profile")
    if profile is not None and algorithm is not None and algorithm not in KINDS:
        raise InputError(f"attention names algorithm {algorithm!r} beside a profile, which takes its place; remove one")
    if file is not None:
        layer["profile"] = _read(file)
    profile = layer.get("profile")
    if not isinstance(profile, Mapping):
        return layer
    beside = {name: profile[name] for name in _MEASURED_WITH if profile.get(name) is not None}
    return beside | layer | {"profile": {key: value for key, value in profile.items() if key not in _MEASURED_WITH}}


def _read(name: str) -> Mapping[str, Any]:
    """What the file of a profile says."""
    program = "scripts/calibrate_attention.py"
    return read_measured("attention profile", name, PROFILE_FOLDER, read_yaml, "stretches", program)
