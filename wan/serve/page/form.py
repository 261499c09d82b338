"""Between a run's settings and the controls of the page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla import InputError, NablaConfig
from nabla.checks import is_number
from nabla.profile import is_profile_name
from wan.config.attention_settings import attention_to_dict
from wan.config.checks import guide_scale_text
from wan.config.prompts import clean_prompt
from wan.config.settings import Settings

# What keeps blocks, as the page names it.
DENSE, THRESHOLD, SHARE, WINDOW = "Dense", "Threshold", "Share", "Window"
USUAL_AMOUNT = {THRESHOLD: 0.7, SHARE: 0.2}
USUAL_WINDOW = "11-3-3"
# Of an algorithm, the parts without controls that go with what the controls say.
BESIDE = {THRESHOLD: ("min-", "max-", "pool-", "dropped-"), SHARE: ("pool-", "dropped-"), WINDOW: ("dropped-",)}
USUAL_CACHE = "first_block"

Layer = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """What the page's controls hold, one field a control; numbers are None where their control was emptied.

    size: width x height; seed: empty draws one
    guide_scale: one, or those of two experts with a comma between
    lora: names of files; scales: one for all, or one each, with commas between
    cache: whether there is a step cache, the settings' own or the usual one
    """

    prompt: str
    negative_prompt: str
    size: str
    frame_num: int | None
    seed: str
    steps: int | None
    guide_scale: str
    shift: float | None
    solver: str
    lora: tuple[str, ...]
    scales: str
    algorithm: str
    dense_steps: int | float | None
    mask_refresh: int | None
    backend: str
    fp8: bool
    cache: bool


def to_form(settings: Settings, prompt: str = "") -> Form:
    """The controls that show settings. A prompt is not one of a preset, so it is given apart."""
    sampling, video, attention = settings.sampling, settings.video, settings.attention
    return Form(
        prompt=prompt,
        negative_prompt=sampling.negative_prompt,
        size="x".join(map(str, video.size)),
        frame_num=video.frame_num,
        seed="" if sampling.seed in (None, -1) else str(sampling.seed),
        steps=sampling.steps,
        guide_scale=guide_scale_text(sampling.guide_scale),
        shift=sampling.shift,
        solver=sampling.solver,
        lora=tuple(Path(one.file).name for one in settings.lora),
        scales=", ".join(f"{one.scale:g}" for one in settings.lora),
        algorithm=attention.algorithm,
        dense_steps=attention.dense_steps,
        mask_refresh=attention.mask_refresh,
        backend=attention.backend,
        fp8=settings.fp8,
        cache=settings.cache is not None,
    )


def to_layer(form: Form, base: Settings, lora_files: Mapping[str, str]) -> Layer:
    """The settings that a form asks for, in the schema of the YAML files.

    base: what the form was made of, which gives all that has no control
    lora_files: paths of the LoRA files that may be chosen, by name
    Raises `InputError` for what cannot be read; whether values are allowed is seen when they are resolved.
    """
    if not clean_prompt(form.prompt or ""):
        raise InputError("the prompt is empty; say what the video should show")
    for name in ("frame_num", "steps", "guide_scale", "shift", "dense_steps", "mask_refresh"):
        if getattr(form, name) in (None, ""):
            raise InputError(f"{name} is empty; give a number")
    values = base.to_dict()
    changed = {
        "sampling": {
            "negative_prompt": form.negative_prompt or "",
            "seed": _seed(form.seed),
            "steps": _whole(form.steps),
            "guide_scale": form.guide_scale,
            "shift": form.shift,
            "solver": form.solver,
        },
        "video": {
            "size": form.size,
            "frame_num": _whole(form.frame_num),
            # Of the size that the settings have, and no other.
            "exact_size": base.video.exact_size and form.size == to_form(base).size,
        },
    }
    layer = values | {section: values[section] | change for section, change in changed.items()}
    layer["attention"] = _attention(form, base)
    # A cache of the settings may have ratios and limits for which there is no control.
    cache = (values["cache"] if base.cache else USUAL_CACHE) if form.cache else "none"
    return layer | {"prompt": form.prompt, "lora": _loras(form, base, lora_files), "fp8": form.fp8, "cache": cache}


def _attention(form: Form, base: Settings) -> Layer:
    own, algorithm = attention_to_dict(base.attention), form.algorithm.strip()
    beside = {
        "mask_refresh": _whole(form.mask_refresh),
        "backend": form.backend,
        "dense_steps": _whole(form.dense_steps),
    }
    if base.attention.profile is not None and algorithm == base.attention.algorithm:
        # It has no string that could be read. That it goes with no dense steps is for the settings to say.
        return own | beside
    # For its error alone: a string that is not known might name a file, of which a page has none but its own.
    NablaConfig.parse(algorithm)
    kept = {name: own[name] for name in ("tile", "dense_layers") if name in own}
    return kept | beside | {"algorithm": algorithm}


def _loras(form: Form, base: Settings, files: Mapping[str, str]) -> list[Layer]:
    # For which there is no control.
    experts = {Path(one.file).name: one.expert for one in base.lora}
    if unknown := [name for name in form.lora if name not in files]:
        raise InputError(f"lora {unknown[0]} is not here; add the file")
    scales = parse_scales(form.scales, len(form.lora))
    return [
        {"file": files[name], "scale": scale, "expert": experts.get(name)} for name, scale in zip(form.lora, scales)
    ]


def parse_scales(text: str, count: int) -> list[float]:
    """Scales of `count` LoRA files: none given means 1, one is for all of them."""
    words = [word for word in re.split(r"[,;\s]+", text or "") if word]
    try:
        scales = [float(word) for word in words] or [1.0]
    except ValueError:
        raise InputError(f"lora scales {text!r} are not numbers; write 0.8, or 0.8, 1.0 for two files") from None
    # float() also takes nan and inf.
    if not all(map(is_number, scales)):
        raise InputError(f"lora scales {text!r} are not numbers; write 0.8, or 0.8, 1.0 for two files")
    # Without a file there is nothing to scale, and what the control still holds does no harm.
    if len(scales) not in (1, count) and count:
        raise InputError(f"lora scales {text!r} are {len(scales)}, for {count} files; give one for all, or one each")
    return scales * count if len(scales) == 1 else scales[:count]


def _seed(text: str) -> int | None:
    text = (text or "").strip()
    if not text:
        return None
    # Short, and in plain digits: int() takes more than that, and raises an error of its own for very long texts.
    if not re.fullmatch(r"-?[0-9]{1,20}", text):
        raise InputError(f"seed {text[:40]!r} is not a whole number; leave it empty to draw one")
    return int(text)


def _whole(number: float) -> int | float:
    # Controls give whole numbers as floats; others are for the settings to refuse.
    return int(number) if float(number).is_integer() else number


def to_algorithm(kind: str, amount: float | None, window: str, before: str = "") -> str:
    """The algorithm string that the controls beside it spell, with what they do not say of the one before."""
    beside = [part for part in (before or "").split("_") if part.startswith(BESIDE.get(kind, ()))]
    sta = "sta-" + "-".join(re.findall(r"\d+", window or "") or [USUAL_WINDOW])
    if kind == DENSE:
        return "dense"
    if kind == WINDOW:
        return "_".join([*beside, sta])
    share = f"{'nabla' if kind == THRESHOLD else 'keep'}-{USUAL_AMOUNT[kind] if amount is None else amount:g}"
    return "_".join([share, *beside, *([sta] if (window or "").strip() else [])])


def to_controls(algorithm: str) -> tuple[str | None, float, str]:
    """Kind, amount and window of an algorithm string; raises `InputError` for one that is not known.

    A profile is of none of the kinds: what each layer keeps is in the settings that the page has it from.
    """
    algorithm = (algorithm or "").strip()
    if is_profile_name(algorithm):
        return None, USUAL_AMOUNT[THRESHOLD], ""
    config = NablaConfig.parse(algorithm)
    window = "-".join(map(str, config.window)) if config.window else ""
    if config.threshold is not None:
        return THRESHOLD, config.threshold, window
    if config.keep is not None:
        return SHARE, config.keep, window
    return (WINDOW if window else DENSE), USUAL_AMOUNT[THRESHOLD], window


def lora_choices(library: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """Paths by name of the LoRA files that may be chosen beside these settings, which may bring their own."""
    return dict(library) | {Path(one.file).name: one.file for one in settings.lora}


def size_choices(settings: Settings) -> list[str]:
    """Sizes to offer: that of the settings first, then Wan2.1's own."""
    own = "x".join(map(str, settings.video.size))
    return list(dict.fromkeys([own, "1280x720", "720x1280", "832x480", "480x832", "1024x1024"]))
